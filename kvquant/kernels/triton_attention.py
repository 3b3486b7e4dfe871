"""Attention over keys and values that come part by part, by Triton kernels on tensor cores.

Where there are too few tiles for the device, keys are split among programs (split-KV), each with a
state of its own, and a last launch merges them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from kvquant.kernels.triton_attention_kernels import _attend, _merge

CPU_PROGRAMS = 4  # under the interpreter: enough that splits occur


@dataclass(frozen=True)
class Tiles:
    """Launch parameters: rows per tile at most, keys per step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# To tune, by head_dim; fp32 is for tests.
TILES = {
    32: Tiles(128, 64, 4, 3),
    64: Tiles(128, 64, 4, 3),
    128: Tiles(128, 64, 8, 3),
    256: Tiles(128, 32, 8, 2),
}
TILES_FP32 = Tiles(32, 32, 4, 1)
# The same where a thread block may take so many bytes of shared memory: the stages of keys and
# values and the tile of queries fill them on Hopper.
LARGE_TILES, LARGE_TILES_BYTES = {128: Tiles(128, 128, 8, 3)}, 227 << 10
MERGED_ROWS = 4

# How keys relate to queries: all seen; by position; the call's own columns.
OPEN, CAUSAL, OWN = 0, 1, 2


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _tiles(queries: torch.Tensor) -> Tiles:
    """Returns the launch parameters for queries `[..., head_dim]` of a dtype and a device."""
    dim, device = queries.shape[-1], queries.device
    if queries.dtype is torch.float32:
        return TILES_FP32
    if device.type == "cuda" and dim in LARGE_TILES:
        facts = torch.cuda.get_device_properties(device)
        if facts.shared_memory_per_block_optin >= LARGE_TILES_BYTES:
            return LARGE_TILES[dim]
    return TILES[dim]


class RunningAttention:
    """Softmax attention of some queries that is fed with a known number of parts.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]`, rotated; fp16, bf16 or fp32.
        positions: int64 `[batch_size, q_len]`.
        num_kv_heads: Key heads; `num_heads` is a multiple of it.
        scaling: Factor of the scores.
        parts: How many parts will come.
        max_keys: Keys of the longest part; bounds the number of splits.
        soft_cap: Bound of the scores, by which the hyperbolic tangent squeezes them; None: there is
            none.
        sink_logits: `[num_heads]`, a logit of each query head that takes its share of the softmax
            and has no value; None: there is none.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        num_kv_heads: int,
        scaling: float,
        parts: int,
        max_keys: int,
        *,
        soft_cap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> None:
        batch, heads, columns, dim = queries.shape
        self._queries = queries if queries.stride(3) == 1 else queries.contiguous()
        self._positions = positions.contiguous()
        self._kv_heads, self._group = num_kv_heads, heads // num_kv_heads
        log2_e = math.log2(math.e)
        self._capped, self._cap, self._steepness = soft_cap is not None, 1.0, 1.0
        self._scale = scaling * log2_e
        if soft_cap is not None:
            self._cap, self._steepness = soft_cap, 2 * log2_e * scaling / soft_cap
            self._scale = log2_e
        self._sink_logits = None if sink_logits is None else sink_logits.contiguous()
        self._parts, self._done = parts, 0
        tiles = _tiles(queries)
        rows = self._group * columns
        height = min(tiles.rows, max(16, triton.next_power_of_2(rows)))
        if height < 64:  # little work: no more warps than needed
            tiles = Tiles(height, tiles.keys, min(tiles.warps, 4), tiles.stages)
        self._tiles = Tiles(height, tiles.keys, tiles.warps, tiles.stages)
        programs = -(-rows // height) * num_kv_heads * batch
        wanted = 2 * _multiprocessors(queries.device) // programs
        self._splits = max(1, min(wanted, 64, -(-max_keys // tiles.keys)))
        self._out = queries.new_empty((batch, columns, heads, dim))
        self._count = batch * num_kv_heads * rows
        state: tuple[int, ...] = (self._splits, self._count)
        if self._splits == 1 and parts == 1:
            state = (0, 0)
        self._state = tuple(
            torch.empty(shape, dtype=torch.float32, device=queries.device)
            for shape in ((*state, dim), state, state)
        )

    def add_past(
        self,
        data: torch.Tensor,
        base: int,
        places: int,
        lengths: torch.Tensor,
        *,
        causal: bool,
        order: torch.Tensor | None = None,
    ) -> None:
        """Attends to a range of the past.

        Args:
            data: `[2, batch_size, num_kv_heads, room, head_dim]`, rotated keys and values.
            base: Position of the first place.
            places: Places of the range, at most the room.
            lengths: int32 `[batch_size, 4]`, whose last number is a sequence's tokens.
            causal: A query sees keys at its position or before; else all of them.
            order: int32 `[num_kv_heads, head_dim]`, the channels of keys in the order in which they
                lie in `data`; None where it is their own.
        """
        kind = CAUSAL if causal else OPEN
        self._launch(data[0], data[1], kind, lengths, None, order, base, places)

    def add_own(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None
    ) -> None:
        """Attends to the call's own tokens: a column sees those up to itself.

        Args:
            keys: `[batch_size, num_kv_heads, q_len, head_dim]`, rotated.
            values: The same shape.
            positions: int64 `[batch_size, q_len]`, negative where a column is no token; None where
                all are.
        """
        kind = self._queries.dtype
        both = [x if x.stride(3) == 1 else x.contiguous() for x in (keys.to(kind), values.to(kind))]
        valid = None if positions is None else positions.contiguous()
        # Nothing reads the lengths of this kind.
        self._launch(both[0], both[1], OWN, self._positions, valid, None, 0, keys.shape[2])

    def _launch(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        kind: int,
        lengths: torch.Tensor,
        valid: torch.Tensor | None,
        order: torch.Tensor | None,
        base: int,
        places: int,
    ) -> None:
        q, tiles, sinks = self._queries, self._tiles, self._sink_logits
        batch, _, columns, dim = q.shape
        first, self._done = self._done == 0, self._done + 1
        last = self._done == self._parts and self._splits == 1
        grid = (-(-columns * self._group // tiles.rows), self._kv_heads, batch * self._splits)
        _attend[grid](
            q, keys, values, self._out, *self._state, self._positions,
            self._positions if valid is None else valid, lengths,
            lengths if order is None else order, q if sinks is None else sinks, base, places,
            self._splits, self._scale, self._cap, self._steepness, columns,
            *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], self._group, dim,
            tiles.rows, tiles.keys, kind, valid is not None, order is not None,
            self._capped, sinks is not None, first, last,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def result(self) -> torch.Tensor:
        """Returns `[batch_size, q_len, num_heads, head_dim]` in the dtype of the queries."""
        assert self._done == self._parts
        if self._splits > 1:
            _merge[(-(-self._count // MERGED_ROWS),)](
                *self._state, self._out, self._splits, self._queries.shape[2], self._kv_heads,
                self._count, self._group, self._queries.shape[3], MERGED_ROWS, num_warps=4,
            )  # fmt: skip
        return self._out
