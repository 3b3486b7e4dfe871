"""Attention of many queries with 8-bit products by the kernels, part by part of the keys."""

from __future__ import annotations

import functools

import torch

from kvquant.kernels import cuda_prompt_attention, triton_prompt_attention
from kvquant.kernels.backends import Backend
from kvquant.kernels.cuda_build import index_of
from kvquant.kernels.cuda_prompt_attention import PromptParams, PromptShape
from kvquant.kernels.triton_prompt_pack import QUERIES, pack_keys, pack_queries


@functools.lru_cache(maxsize=64)
def _constant_counts(
    batch: int, queries: int, keys: int, before: int, device: torch.device
) -> torch.Tensor:
    """Counts of sequences that are all alike, see `Keys.counts` of `triton_prompt_pack`."""
    with torch.inference_mode(False):
        return torch.tensor([[queries, keys, before]] * batch, dtype=torch.int32).to(device)


def token_columns(valid: torch.Tensor) -> torch.Tensor:
    """Returns the columns of each sequence's tokens, int32 `[batch_size, columns]`.

    Padding comes behind the tokens. The host does not wait.

    Args:
        valid: bool `[batch_size, columns]`.
    """
    return valid.logical_not().byte().argsort(stable=True, dim=1).int()


class PromptParts:
    """Causal attention of many queries whose keys come in a known number of parts.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]`, rotated.
        num_kv_heads: Key heads; `num_heads` is a multiple of it.
        scaling: Factor of the scores.
        parts: How many parts will come.
        backend: "cuda" or "triton".
        columns: int32 `[batch_size, q_len]`, the columns of each sequence's tokens
            (:func:`token_columns`); None: all columns are tokens.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        num_kv_heads: int,
        scaling: float,
        parts: int,
        backend: Backend,
        *,
        columns: torch.Tensor | None = None,
    ) -> None:
        batch, heads, length, dim = queries.shape
        self._queries, self._scaling, self._columns = queries, scaling, columns
        self._kv_heads, self._backend, self._parts, self._done = num_kv_heads, backend, parts, 0
        shape = batch, length, heads, dim
        # No kernel writes the columns of padding.
        self._out = queries.new_empty(shape) if columns is None else queries.new_zeros(shape)
        self._state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if parts > 1:
            rows = batch, heads, -(-length // QUERIES) * QUERIES
            top = queries.new_empty(rows, dtype=torch.float32)
            self._state = top.new_empty((*rows, dim)), top, torch.empty_like(top)

    def add(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: torch.Tensor | None = None,
        *,
        columns: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        window: int | None = None,
    ) -> None:
        """Attends to a part of the keys.

        Args:
            keys: `[batch_size, num_kv_heads, kv_len, head_dim]`, rotated.
            values: The same shape.
            counts: int32 `[batch_size, 3]`: tokens among the queries, tokens among the keys, and
                keys before the first query: query i sees the keys up to that number plus i. None:
                all are tokens, and the last key is that of the last query.
            columns: int32 `[batch_size, kv_len]`, the columns of the keys' tokens; None: all are.
            order: int32 `[num_kv_heads, head_dim]`, the channels of keys in the order in which they
                lie; None where it is their own.
            window: How many keys a query sees, its own included; None: all before it.
        """
        batch, heads, length, dim = self._queries.shape
        first, self._done = self._done == 0, self._done + 1
        last, swizzled = self._done == self._parts, self._backend == "cuda"
        if counts is None:
            size = keys.shape[2]
            counts = _constant_counts(batch, length, size, size - length, keys.device)
        packed = pack_keys(keys, values, counts, columns, swizzled=swizzled)
        asked = pack_queries(
            self._queries, packed, self._columns, self._scaling, order=order,
            offsets=self._parts > 1 or not swizzled, swizzled=swizzled,
        )  # fmt: skip
        if not swizzled:
            triton_prompt_attention.launch(
                (self._queries, keys, values), asked, packed, self._scaling, order, self._columns,
                columns, self._out, self._state, window, first=first, last=last,
            )  # fmt: skip
            return
        assert packed.values is not None
        state, table = self._state or (None, None, None), self._columns
        params = PromptParams(
            *(
                tuple(t.data_ptr() for t in both)
                for both in (asked.queries, packed.keys, packed.values)
            ),
            *(None if t is None else t.data_ptr() for t in (
                asked.scales, asked.offsets,
                packed.key_scales, packed.value_scales, counts, table,
                self._out if last else None, *state,
            )),
            heads, self._kv_heads, asked.scales.shape[2], packed.key_scales.shape[2], length,
            0 if table is None else table.stride(0), window or 0,
            cuda_prompt_attention.heads_together(heads, self._kv_heads, keys.shape[2], dim), first,
        )  # fmt: skip
        shape = PromptShape(dim, self._out.dtype is torch.bfloat16)
        cuda_prompt_attention.launch(shape, params, batch, index_of(self._out))

    def result(self) -> torch.Tensor:
        """Returns `[batch_size, q_len, num_heads, head_dim]` in the dtype of the queries."""
        assert self._done == self._parts
        return self._out
