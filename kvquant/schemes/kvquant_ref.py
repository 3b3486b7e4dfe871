"""KVQuant's published procedure (Hooper et al., arXiv 2401.18079), the baseline of speed claims.

Written from a description of the steps of the public code (SqueezeAILab/KVQuant, deployment part,
commit 57a2383 of July 2024), without its text. It reads the quantizer files of `nuq` and gives the
same numbers as `nuq`. The steps are those of the public code:

- A prompt is attended in full precision, with all keys and values in 16 bits. It is then packed
  sequence by sequence, because the code supports only batches of one.
- Packing makes fp32 copies, transposed to token by channel. It finds the nearest level in one table
  per channel (keys) or per token (values, fp32), and packs the codes along the channels of a token
  into memory that was allocated ahead.
- Keys are packed before RoPE. Their outliers lie outside the calibrated range and are stored in the
  code's compressed format. They are counted, the host reads the count to size its buffers, and
  they are gathered. Their difference from the outermost level is stored.
- The outliers of values are the k largest and k smallest elements of a token, found by top-k; the
  next ones give the range. Outliers get the middle code, and their difference from it is stored.
- Outliers take fp32 values and int32 channels, and int32 pointers per token.
- An append of a token takes the same steps. Each array of outliers grows by concatenation, so it is
  allocated and copied anew, for keys and for values, and the host waits once for each.
- Sinks are kept in 16 bits: keys after RoPE, and values.

Some things are better than in the public code, so that its faults do not decide the comparison:

- The prompts of a batch share one forward pass.
- Grouped-query attention, padding, any head_dim and appends of several tokens are supported.
- There is no array of start rows, which the code fills in a loop with one device read per token.
- Top-k stays on the device, where the code computes that of a new token on the CPU.
- The allocation grows when it is full.

Others are worse: steps are PyTorch operations where the code has a kernel, and its decode kernels
have no counterpart. Decoding dequantizes piece by piece, so only prefill and append are
comparable. The format of fixed width (42 entries per token), which changes the numbers where a
token has more outliers, is not implemented.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kvquant.cache.attending import AttendingCache, AttendingLayer, Extent, Protocol
from kvquant.cache.forward_call import CallRecord, ForwardCall
from kvquant.cache.interface import CountedCache, NotCut, QuantizeClock, sequence_indices
from kvquant.cache.kept_rope import Table
from kvquant.cache.layout import Span
from kvquant.cache.padding import host_mask
from kvquant.cache.positions import Shifts, check_batch, shifts
from kvquant.cache.window_layer import WindowLayer
from kvquant.cache.window_plan import Windows
from kvquant.errors import UserError
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.rope import Rope
from kvquant.kernels.blockwise_attention import NEVER
from kvquant.schemes.kvquant_layer import ReferenceLayer, ReferencePlan
from kvquant.schemes.kvquant_store import ReferenceTables
from kvquant.schemes.registry import CacheFactory, ModelShape
from kvquant.study.schemes import KvquantRefScheme


class ReferenceCache(AttendingCache[ReferencePlan], CountedCache):
    """A cache that follows KVQuant's published procedure (see the module).

    Args:
        tables: The tables of each layer; None for a layer with a sliding window.
        rope: Maps positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`, of
            the layers with tables.
        protocol: See :class:`AttendingCache`.
        window: The window of the layers without tables; None if there is no such layer.
        soft_cap: Bound of the scores of all layers; None: there is none.
    """

    def __init__(
        self,
        tables: Sequence[ReferenceTables | None],
        rope: Rope,
        protocol: Protocol = "A",
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        extent, clock = Extent(), QuantizeClock()
        layers: list[AttendingLayer[ReferencePlan]] = [
            WindowLayer(window or 0, soft_cap, extent, clock)
            if t is None
            else ReferenceLayer(t, extent, clock, soft_cap)
            for t in tables
        ]
        super().__init__(layers, protocol, extent, clock)
        self.soft_cap = soft_cap
        self._packed = [layer for layer in layers if isinstance(layer, ReferenceLayer)]
        self._sliding = [layer for layer in layers if isinstance(layer, WindowLayer)]
        self._windows = None if window is None else Windows(window)
        self._rope = rope
        # bool [batch_size, columns] on the host; None as long as no column is padding
        self._mask: torch.Tensor | None = None
        self._shifts: Shifts | None = None  # of positions, before the first call

    def begin_forward(
        self,
        batch: int,
        new_len: int,
        mask: torch.Tensor | None,
        device: torch.device,
        positions: torch.Tensor | None = None,
        *,
        given: bool = True,
        held: bool = False,
    ) -> ReferencePlan:
        """See :meth:`AttendingCache.begin_forward`; waits for the device, as the public code does.

        Raises:
            ValueError: The mask contradicts an earlier one, or positions do not count the tokens.
            UserError: An earlier call ended after it had begun to store.
        """
        self.calls.check()
        check_batch(positions, batch, new_len, len(self._lengths))
        lengths = self._lengths or [0] * batch
        past, total = self.columns, self.columns + new_len
        queries = keys = torch.arange(past, total, device=device).expand(batch, -1)
        spans: list[Span] = [slice(0, new_len)] * batch
        new_mask = None
        if mask is None and self._mask is not None:
            raise ValueError("attention_mask: needed for every call of a padded batch")
        if mask is not None:
            host = self._host_mask(mask, batch, total)
            new_mask = None if bool(host.all()) else host
            counts = mask.bool().long().cumsum(1)
            queries = (counts[:, past:] - 1).clamp(min=0)
            keys = torch.where(mask[:, past:].bool(), queries, NEVER)
            spans = [_span(row) for row in host[:, past:]]
        followed, shifted = self._follow(positions, given, spans, lengths)
        if shifted and self._windows is not None:
            raise UserError(
                "position_ids: a cache of kind 'kvquant-ref' with sliding windows counts the "
                "tokens of a sequence from 0; pass attention_mask.cumsum(1) - 1 of the new columns"
            )
        self.calls.begin(ForwardCall(len(self.layers), new_len, held, lambda: None))
        key_positions = torch.arange(total, device=device)[None]
        window = None
        if self._windows is not None:
            after = [n + _tokens(span) for n, span in zip(lengths, spans, strict=True)]
            window = self._windows.plan(
                spans,
                lengths,
                after,
                queries,
                None if new_len == 1 else keys,
                None,
                past=past > 0,
                simulated=self.protocol == "B",
            )
        plan = ReferencePlan(
            query_positions=queries,
            rope=self._rope(queries) if shifted else None,
            spans=spans,
            new_positions=keys,
            key_positions=key_positions,
            key_rope=self._rope(key_positions),
            simulated=self.protocol == "B",
            mask=new_mask,
            shifts=followed,
            storing=self.calls.store,
            window=window,
        )
        self.calls.planned(plan)
        return plan

    def _host_mask(self, mask: torch.Tensor, batch: int, total: int) -> torch.Tensor:
        """Returns the mask of a call on the host, which must continue the earlier masks."""
        if mask.dim() != 2 or tuple(mask.shape) != (batch, total):
            raise ValueError(
                f"attention_mask: shape {tuple(mask.shape)}, expected {(batch, total)}"
            )
        host, past = host_mask(mask), self.columns
        known = torch.ones_like(host[:, :past]) if self._mask is None else self._mask
        if not torch.equal(host[:, :past], known):
            raise ValueError(
                "attention_mask: an earlier column was a token and is padding now, or was "
                "padding and is a token now; keep the earlier columns"
            )
        return host

    def _follow(
        self, positions: torch.Tensor | None, given: bool, spans: list[Span], lengths: list[int]
    ) -> tuple[Shifts, bool]:
        """Returns the shifts after a call, and whether the call's positions are shifted."""
        old = self._shifts or Shifts([0] * len(lengths), True)
        if positions is None:
            return old, False
        new = shifts(positions, spans, lengths)
        followed = None if new is None else old.follow(new, lengths, given)
        if new is None or followed is None:
            raise ValueError(
                "position_ids: KVQuant's cache counts the tokens of a sequence and takes no "
                "positions that jump; pass attention_mask.cumsum(1) - 1 of the new columns"
            )
        return followed, any(new)

    def meet(
        self,
        plan: ReferencePlan,
        layer: AttendingLayer[ReferencePlan],
        queries: torch.Tensor,
        keys: torch.Tensor,
        rope: Table,
    ) -> ReferencePlan:
        """See :meth:`AttendingCache.meet`."""
        if plan.rope is None:
            return plan
        return replace(plan, rope=(plan.rope[0].to(keys.dtype), plan.rope[1].to(keys.dtype)))

    def ended(self, plan: ReferencePlan) -> None:
        """See :meth:`AttendingCache.ended`."""
        self._mask, self._shifts = plan.mask, plan.shifts

    @property
    def _lengths(self) -> list[int]:
        """The tokens of each sequence; empty before the first call."""
        return [store.length for store in self._packed[0].stores]

    @property
    def batch_size(self) -> int:
        """Returns the number of sequences; -1 before the first call."""
        return len(self._packed[0].stores) or -1

    def _choose(self, order: list[int]) -> None:
        if not self._packed[0].stores:
            return
        with self.calls.changing("a choice of sequences"):
            if self._mask is not None:
                chosen = self._mask[order]
                self._mask = None if bool(chosen.all()) else chosen
            if self._shifts is not None:
                self._shifts = self._shifts.select(order)
            self._choose_stores(order)
            for window in self._sliding:
                window.select(torch.tensor(order))

    def _choose_stores(self, order: list[int]) -> None:
        for layer in self._packed:
            used: set[int] = set()
            stores = []
            for i in order:
                stores.append(layer.stores[i].fork() if i in used else layer.stores[i])
                used.add(i)
            layer.stores = stores

    def copy(self) -> ReferenceCache:
        """Returns an independent copy, with which a prompt can be reused."""
        self.calls.check()
        tables = [getattr(layer, "tables", None) for layer in self.layers]
        window = None if self._windows is None else self._windows.window
        other = ReferenceCache(tables, self._rope, self.protocol, window, self.soft_cap)
        other.extent.columns, other.rotary = self.columns, self.rotary
        other.unrotated = self.unrotated
        other._mask, other._shifts = self._mask, self._shifts
        for mine, theirs in zip(self._packed, other._packed, strict=True):
            theirs.stores = [store.fork() for store in mine.stores]
        other._windows = None if self._windows is None else self._windows.fork()
        for held, copied in zip(self._sliding, other._sliding, strict=True):
            copied.ring = held.fork()
        return other

    def __copy__(self) -> ReferenceCache:
        """See :meth:`copy`; two caches cannot share layers."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceCache:
        """See :meth:`copy`; the model, whose rotary embedding the cache holds, is not copied."""
        return self.copy()

    def reset(self) -> None:
        """Removes all tokens."""
        self.extent.columns, self.calls = 0, CallRecord()
        self._mask = self._shifts = None
        for layer in self._packed:
            layer.stores = []
        self._windows = None if self._windows is None else self._windows.empty()
        for window in self._sliding:
            window.ring = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences, as beam search needs."""
        indices = sequence_indices("beam_idx", beam_idx, self.batch_size, whole=True)
        self._choose(indices.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the given sequences, named by int64 indices or a bool mask."""
        self._choose(sequence_indices("indices", indices, self.batch_size).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence the given number of times."""
        if repeats < 1:
            raise ValueError(f"repeats: must be at least 1, got {repeats}")
        count = len(self._packed[0].stores)
        self._choose([i for i in range(count) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to remove tokens, because the public code writes each slot once."""
        raise NotCut("KVQuant's cache")

    def stored_nbytes(self) -> int:
        """Returns the bytes that are allocated, tables included."""
        stores = sum(store.nbytes for layer in self._packed for store in layer.stores)
        return stores + sum(layer.nbytes for layer in self._sliding) + self.shared_nbytes()

    def shared_nbytes(self) -> int:
        """Returns the bytes of the tables, which all sequences share."""
        return sum(layer.tables.nbytes for layer in self._packed if layer.stores)

    def stored_elements(self, mask: torch.Tensor | None) -> int:
        """Returns the number of key and value elements of all tokens."""
        packed = sum(
            2 * layer.tables.heads * layer.tables.dim * store.length
            for layer in self._packed
            for store in layer.stores
        )
        return packed + sum(layer.elements(self._lengths) for layer in self._sliding)


def _tokens(span: Span) -> int:
    """Returns the number of columns in a span."""
    return span.stop - span.start if isinstance(span, slice) else span.numel()


def _span(row: torch.Tensor) -> Span:
    """Returns the true columns of a bool row on the host, as a slice where they are contiguous."""
    where = row.nonzero().view(-1)
    if not where.numel():
        return slice(0, 0)
    first, last = int(where[0]), int(where[-1])
    return slice(first, last + 1) if last - first + 1 == where.numel() else where


def make_caches(
    spec: KvquantRefScheme, shape: ModelShape, tables: list[LayerQuantizer]
) -> CacheFactory:
    """Returns a function that makes empty caches, which share one set of tables."""
    if not tables:
        raise UserError(
            "model: all layers have a sliding window, which is kept in 16 bits, so that a cache of "
            "kind 'kvquant-ref' packs nothing; use scheme kind fp16"
        )
    given = iter([ReferenceTables(spec, layer) for layer in tables])
    windows = shape.windows or (None,) * shape.num_layers
    found = [next(given) if window is None else None for window in windows]
    window = next((window for window in windows if window is not None), None)
    return lambda protocol, rope: ReferenceCache(found, rope, protocol, window, shape.soft_cap)
