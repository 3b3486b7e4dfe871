"""Attention over keys and values that come part by part, by Triton kernels on tensor cores.

Online softmax as in FlashAttention (Dao et al., arXiv 2205.14135); between parts the running
maximum, sum and fp32 output of each row lie in memory. The query heads of a group are rows of one
tile, so a key is read once for all of them. Where there are too few tiles for the device, keys are
split among programs (split-KV), each with a state of its own, and a last launch merges them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

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


@triton.jit
def _over_keys(
    out, top, total, q, k, v, stride_k, stride_v, lo, hi, last, valid, scale,
    BN: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """Attends to the keys `[lo, hi)`; with MASK, a row sees those up to `last`."""
    lane, column = tl.arange(0, BN), tl.arange(0, DIM)
    for start in range(lo, hi, BN):
        key = start + lane
        at = key.to(tl.int64)
        if MASK:
            inside = key < hi
            tile = tl.load(
                k + at[None, :] * stride_k + column[:, None], mask=inside[None, :], other=0.0
            )
        else:
            tile = tl.load(k + at[None, :] * stride_k + column[:, None])
        scores = tl.dot(q, tile, input_precision="ieee")
        if MASK:
            seen = key[None, :] <= last[:, None]
            if VALID:
                token = tl.load(valid + key, mask=inside, other=-1) >= 0
                seen = seen & token[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
        safe = higher
        if MASK:
            # A row that has seen nothing keeps -inf; a finite stand-in keeps NaN out.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - safe[:, None])
        old = tl.exp2(top - safe)
        total = total * old + tl.sum(weights, axis=1)
        out = out * old[:, None]
        if MASK:
            value = tl.load(
                v + at[:, None] * stride_v + column[None, :], mask=inside[:, None], other=0.0
            )
        else:
            value = tl.load(v + at[:, None] * stride_v + column[None, :])
        out = tl.dot(weights.to(value.dtype), value, out, input_precision="ieee")
        top = higher
    return out, top, total


@triton.jit
def _attend(
    queries,
    keys,
    values,
    result,
    part_out,
    part_top,
    part_total,
    positions,
    valid,
    lengths,
    order,
    base,
    places,
    splits,
    scale,
    columns,
    q_sequence,
    q_head,
    q_column,
    k_sequence,
    k_head,
    k_token,
    v_sequence,
    v_head,
    v_token,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    VALID: tl.constexpr,
    ORDERED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Attends with a tile of rows (column, head of the group) to a split of a part's keys.

    With ORDERED the channels of keys lie in the head's `order`, in which queries are read, too.
    With LAST the result is written, otherwise the running state.
    """
    head, kv_heads = tl.program_id(1), tl.num_programs(1)
    sequence, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    rows = columns * GROUP
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < rows
    clamped = tl.minimum(row, rows - 1)
    column, member = clamped // GROUP, clamped % GROUP
    if KIND == 2:
        last = column
    else:
        count = tl.minimum(tl.maximum(tl.load(lengths + sequence * 4 + 3) - base, 0), places)
        last = tl.zeros((BM,), tl.int32) + (count - 1)
        if KIND == 1:
            own = tl.load(positions + sequence * columns + column).to(tl.int32)
            last = tl.minimum(own - base, last)
    end = tl.maximum(tl.max(last, axis=0) + 1, 0)
    # Keys below this are seen by all rows of the tile.
    full = tl.maximum(tl.min(last, axis=0) + 1, 0) // BN * BN
    if VALID:
        full = 0
    each = tl.cdiv(tl.cdiv(end, BN), splits) * BN
    lo = split * each
    hi = tl.minimum(end, lo + each)
    if not FIRST and not LAST and hi <= lo:
        return
    full = tl.maximum(tl.minimum(full, hi), lo)
    d = tl.arange(0, DIM)[None, :]
    q = queries + sequence.to(tl.int64) * q_sequence + (head * GROUP + member)[:, None] * q_head
    if ORDERED:
        channel = tl.load(order + head * DIM + tl.arange(0, DIM))[None, :]
        q = tl.load(q + column[:, None].to(tl.int64) * q_column + channel)
    else:
        q = tl.load(q + column[:, None].to(tl.int64) * q_column + d)
    state = ((split * (tl.num_programs(2) // splits) + sequence) * kv_heads + head).to(tl.int64)
    state = state * rows + row
    if FIRST:
        out = tl.zeros((BM, DIM), tl.float32)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
    else:
        out = tl.load(part_out + state[:, None] * DIM + d, mask=there[:, None], other=0.0)
        top = tl.load(part_top + state, mask=there, other=float("-inf"))
        total = tl.load(part_total + state, mask=there, other=0.0)
    k = keys + sequence.to(tl.int64) * k_sequence + head.to(tl.int64) * k_head
    v = values + sequence.to(tl.int64) * v_sequence + head.to(tl.int64) * v_head
    valid += sequence * columns
    if not VALID:
        out, top, total = _over_keys(
            out, top, total, q, k, v, k_token, v_token, lo, full, last, valid, scale,
            BN, DIM, False, False,
        )  # fmt: skip
    out, top, total = _over_keys(
        out, top, total, q, k, v, k_token, v_token, full, hi, last, valid, scale,
        BN, DIM, True, VALID,
    )  # fmt: skip
    if LAST:
        out = out / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (sequence.to(tl.int64) * columns + column) * (kv_heads * GROUP) + head * GROUP
        target = result + (place + member)[:, None] * DIM + d
        tl.store(target, out.to(result.dtype.element_ty), mask=there[:, None])
    else:
        tl.store(part_out + state[:, None] * DIM + d, out, mask=there[:, None])
        tl.store(part_top + state, top, mask=there)
        tl.store(part_total + state, total, mask=there)


@triton.jit
def _merge(
    part_out,
    part_top,
    part_total,
    result,
    splits,
    columns,
    kv_heads,
    count,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
):
    """Merges some rows of the states of all splits, `count` rows each, into the result."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = row < count
    d = tl.arange(0, DIM)[None, :]
    out = tl.zeros((BM, DIM), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for _ in range(splits):
        other = tl.load(part_top + row, mask=there, other=float("-inf"))
        higher = tl.maximum(top, other)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        old, weight = tl.exp2(top - safe), tl.exp2(other - safe)
        total = total * old + tl.load(part_total + row, mask=there, other=0.0) * weight
        add = tl.load(part_out + row[:, None] * DIM + d, mask=there[:, None], other=0.0)
        out = out * old[:, None] + add * weight[:, None]
        top = higher
        part_top += count
        part_total += count
        part_out += count * DIM
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    rows = columns * GROUP
    inner, outer = row % rows, row // rows
    head, sequence = outer % kv_heads, outer // kv_heads
    place = (sequence * columns + inner // GROUP) * (kv_heads * GROUP) + head * GROUP
    target = result + (place + inner % GROUP)[:, None] * DIM + d
    tl.store(target, out.to(result.dtype.element_ty), mask=there[:, None])


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
    """

    def __init__(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        num_kv_heads: int,
        scaling: float,
        parts: int,
        max_keys: int,
    ) -> None:
        batch, heads, columns, dim = queries.shape
        self._queries = queries if queries.stride(3) == 1 else queries.contiguous()
        self._positions = positions.contiguous()
        self._kv_heads, self._group = num_kv_heads, heads // num_kv_heads
        self._scale = scaling * math.log2(math.e)
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
        q, tiles = self._queries, self._tiles
        batch, _, columns, dim = q.shape
        first, self._done = self._done == 0, self._done + 1
        last = self._done == self._parts and self._splits == 1
        grid = (-(-columns * self._group // tiles.rows), self._kv_heads, batch * self._splits)
        _attend[grid](
            q, keys, values, self._out, *self._state, self._positions,
            self._positions if valid is None else valid, lengths,
            lengths if order is None else order, base, places, self._splits, self._scale, columns,
            *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], self._group, dim,
            tiles.rows, tiles.keys, kind, valid is not None, order is not None, first, last,
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
