"""The Triton kernel of attention with INT8 scores and 16-bit values (`triton_prompt_attention`)."""

from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.eight_bit_attention import MAX_DROP

LOWEST = tl.constexpr(-1e30)  # stands for a maximum of nothing
DROP = tl.constexpr(MAX_DROP)


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
    TILE: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
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
    k = keys + kv_head.to(tl.int64) * key_tiles * TILE * DIM
    v = values + sequence.to(tl.int64) * v_sequence + (head // GROUP).to(tl.int64) * v_head
    result = tl.zeros((BM, DIM), tl.float32)
    top = tl.full((BM,), LOWEST, tl.float32)
    highest = top
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
        scale = q_scale * tl.load(key_scales + kv_head * key_tiles + start // TILE)
        scores = tl.dot(q, x).to(tl.float32) * scale[:, None]
        seen = key[None, :] <= last[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > (row + offset - window)[:, None])
        scores = tl.where(seen, scores, LOWEST)
        here = tl.max(scores, axis=1)
        highest = tl.maximum(highest, here)
        # Relative to what these keys have at most, so that 16 bits hold their weights.
        base = tl.where(here == LOWEST, top, tl.maximum(here, highest - DROP))
        weights = tl.where(seen, tl.exp2(scores - base[:, None]), 0.0)
        factor = tl.exp2(top - base)
        total = total * factor + tl.sum(weights, axis=1)
        column = key.to(tl.int64)
        if KEY_COLUMNS:
            column = tl.load(key_columns + sequence * key_stride + key, mask=inside, other=0)
            column = column.to(tl.int64)
        value = tl.load(v + column[:, None] * v_token + d[None, :], mask=inside[:, None], other=0.0)
        result = result * factor[:, None]
        result = tl.dot(weights.to(value.dtype), value, result, input_precision="ieee")
        top = base
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
        if QUERY_COLUMNS:
            column = tl.load(query_columns + sequence * query_stride + row, mask=there, other=0)
        place = (sequence.to(tl.int64) * columns + column) * heads + head
        place = place[:, None] * DIM + d[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=there[:, None])
    else:
        tl.store(state_out + at, result, mask=there[:, None])
        tl.store(state_top + own + row, top, mask=there)
        tl.store(state_total + own + row, total, mask=there)
