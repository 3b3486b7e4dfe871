"""A Triton kernel of attention of many queries: scores of INT8 products, values in 16 bits.

It takes the shapes and GPUs that the CUDA kernel (`cuda/prompt_attention.cu`) does not. Operands
are those of :mod:`kvquant.kernels.triton_prompt_pack`, not swizzled; values are read as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from kvquant.kernels.triton_prompt_pack import KEYS, QUERIES

if TYPE_CHECKING:
    from kvquant.kernels.triton_prompt_pack import Keys, Queries

LOWEST = tl.constexpr(-1e30)  # stands for a maximum of nothing


class Tiles(NamedTuple):
    """Sizes of the kernel, to tune.

    Attributes:
        rows: Queries of a program.
        keys: Keys that it reads at a time, a divisor of :data:`KEYS`.
        warps: Warps of a program.
        stages: Tiles of keys on their way.
    """

    rows: int
    keys: int
    warps: int
    stages: int


TILES = {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)}


@triton.jit
def _attend_prompt(
    queries,
    keys,
    values,
    query_scales,
    query_offsets,
    key_scales,
    counts,
    query_columns,
    key_columns,
    out,
    state_out,
    state_top,
    state_total,
    columns,
    query_stride,
    key_stride,
    key_tiles,
    window,
    v_sequence,
    v_head,
    v_token,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    OFFSETS: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Attends with a tile of queries of one head to all keys that they see.

    Without FIRST the state of earlier parts is added; with LAST the result is written, otherwise
    the state.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # rows with most keys first
    head, sequence = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    num_rows = tl.load(counts + sequence * 3)
    num_keys = tl.load(counts + sequence * 3 + 1)
    offset = tl.load(counts + sequence * 3 + 2)
    if tile * BM >= num_rows:
        return
    d, n = tl.arange(0, DIM), tl.arange(0, BN)
    row = tile * BM + tl.arange(0, BM)
    there = row < num_rows
    own = (sequence * heads + head).to(tl.int64) * ROOM
    kv_head = sequence * (heads // GROUP) + head // GROUP
    q = tl.load(queries + (own + row[:, None]) * DIM + d[None, :], mask=there[:, None], other=0)
    q_scale = tl.load(query_scales + own + row, mask=there, other=0.0)
    k = keys + kv_head.to(tl.int64) * key_tiles * KEYS * DIM
    v = values + sequence.to(tl.int64) * v_sequence + (head // GROUP).to(tl.int64) * v_head
    result = tl.zeros((BM, DIM), tl.float32)
    top = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    last = tl.minimum(row + offset, num_keys - 1)  # the last key that a row sees
    stop = tl.minimum(num_keys, tl.minimum((tile + 1) * BM, num_rows) + offset)
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, tile * BM + offset + 1 - window) // BN * BN
    for start in range(begin, stop, BN):
        key = start + n
        inside = key < num_keys
        x = tl.load(k + key[None, :] * DIM + d[:, None], mask=inside[None, :], other=0)
        scale = q_scale * tl.load(key_scales + kv_head * key_tiles + start // KEYS)
        scores = tl.dot(q, x).to(tl.float32) * scale[:, None]
        seen = key[None, :] <= last[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > (row + offset - window)[:, None])
        scores = tl.where(seen, scores, LOWEST)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        factor = tl.exp2(top - higher)
        total = total * factor + tl.sum(weights, axis=1)
        column = key.to(tl.int64)
        if COLUMNS:
            column = tl.load(key_columns + sequence * key_stride + key, mask=inside, other=0)
            column = column.to(tl.int64)
        value = tl.load(v + column[:, None] * v_token + d[None, :], mask=inside[:, None], other=0.0)
        result = result * factor[:, None]
        result = tl.dot(weights.to(value.dtype), value, result, input_precision="ieee")
        top = higher
    if OFFSETS:
        added = tl.load(query_offsets + own + row, mask=there, other=0.0)
        top = tl.where(top == LOWEST, LOWEST, top + added)
    at = (own + row[:, None]) * DIM + d[None, :]
    if not FIRST:
        other = tl.load(state_top + own + row, mask=there, other=LOWEST)
        higher = tl.maximum(top, other)
        shrink, before = tl.exp2(top - higher), tl.exp2(other - higher)
        earlier = tl.load(state_total + own + row, mask=there, other=0.0)
        total = total * shrink + earlier * before
        earlier = tl.load(state_out + at, mask=there[:, None], other=0.0)
        result = result * shrink[:, None] + earlier * before[:, None]
        top = higher
    if LAST:
        result = result / tl.where(total > 0.0, total, 1.0)[:, None]
        column = row
        if COLUMNS:
            column = tl.load(query_columns + sequence * query_stride + row, mask=there, other=0)
        place = (sequence.to(tl.int64) * columns + column) * heads + head
        place = place[:, None] * DIM + d[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=there[:, None])
    else:
        tl.store(state_out + at, result, mask=there[:, None])
        tl.store(state_top + own + row, top, mask=there)
        tl.store(state_total + own + row, total, mask=there)


def launch(
    queries: Queries,
    keys: Keys,
    values: torch.Tensor,
    query_columns: torch.Tensor | None,
    key_columns: torch.Tensor | None,
    out: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    window: int | None,
    *,
    first: bool,
    last: bool,
) -> None:
    """Attends to a part of the keys.

    Args:
        queries: Quantized queries.
        keys: Quantized keys.
        values: `[batch_size, num_kv_heads, kv_len, head_dim]`, 16 bits.
        query_columns: The columns of the queries' tokens; None: their numbers.
        key_columns: The columns of the keys' tokens; None where `query_columns` is None.
        out: `[batch_size, q_len, num_heads, head_dim]`, written with `last`.
        state: Output, maximum and sum of every row so far; None for a single part.
        window: A row sees so many keys, itself included; None: all before it.
        first: Whether no part came before.
        last: Whether none comes behind.
    """
    values = values if values.stride(3) == 1 else values.contiguous()
    batch, columns, heads, dim = out.shape
    tiles, room = TILES[dim], queries.scales.shape[2] * QUERIES
    padded = key_columns is not None or query_columns is not None
    counts = keys.counts
    held = (queries.scales,) * 3 if state is None else state
    tables = [counts if t is None else t for t in (query_columns, key_columns)]
    _attend_prompt[(-(-room // tiles.rows), heads, batch)](
        queries.queries, keys.keys, values, queries.scales,
        queries.scales if queries.offsets is None else queries.offsets, keys.key_scales, counts,
        *tables, out, *held, columns, tables[0].stride(0), tables[1].stride(0),
        keys.keys.shape[2], window or 0, *values.stride()[:3],
        heads // keys.keys.shape[1], dim, tiles.rows, tiles.keys, KEYS, QUERIES, padded,
        queries.offsets is not None, window is not None, first, last, room,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
