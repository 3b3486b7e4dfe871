"""The Triton kernel of attention with INT8 scores and 16-bit values (`triton_prompt_attention`).

Fine tiles have scores in 16 bits, too, from queries and keys as they were given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.eight_bit_attention import MAX_DROP, NEAR_TILES
from kvquant.kernels.triton_prompt_pack_kernels import _column, _load_tokens

LOWEST = tl.constexpr(-1e30)  # stands for a maximum of nothing
DROP = tl.constexpr(MAX_DROP)
NEAR = tl.constexpr(NEAR_TILES)


@triton.jit
def _add_weighed(
    result, total, top, highest, scores, seen, values, sequence, kv_head, place, inside,
    v_sequence, v_head, v_token, d,
):  # fmt: skip
    """Adds some values, weighed by their scores, to a running softmax."""
    scores = tl.where(seen, scores, LOWEST)
    here = tl.max(scores, axis=1)
    highest = tl.maximum(highest, here)
    # Relative to what these keys have at most, so that 16 bits hold their weights.
    base = tl.where(here == LOWEST, top, tl.maximum(here, highest - DROP))
    weights = tl.where(seen, tl.exp2(scores - base[:, None]), 0.0)
    factor = tl.exp2(top - base)
    total = total * factor + tl.sum(weights, axis=1)
    value = _load_tokens(values, sequence, kv_head, place, d, inside, v_sequence, v_head, v_token)
    result = result * factor[:, None]
    result = tl.dot(weights.to(value.dtype), value, result, input_precision="ieee")
    return result, total, base, highest


@triton.jit
def _seen(key, last, WINDOW: tl.constexpr, before):
    """Says which keys rows see: up to the last one, and with WINDOW those behind `before`."""
    seen = key[None, :] <= last[:, None]
    if WINDOW:
        seen = seen & (key[None, :] > before[:, None])
    return seen


@triton.jit
def _attend_prompt(
    given_queries,
    given_keys,
    values,
    queries,
    keys,
    query_scales,
    query_offsets,
    key_scales,
    counts,
    order,
    query_columns,
    key_columns,
    out,
    state_out,
    state_top,
    state_total,
    scaling,
    columns,
    query_stride,
    key_stride,
    key_tiles,
    window,
    q_sequence,
    q_head,
    q_token,
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
    TILE: tl.constexpr,
    ORDERED: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
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
    kv_head = head // GROUP
    own_kv = sequence * (heads // GROUP) + kv_head
    q_scale = tl.load(query_scales + own + row, mask=there, other=0.0)
    # What the mean of the keys adds to scores, which quantized keys are without.
    q_mean = tl.load(query_offsets + own + row, mask=there, other=0.0)
    k = keys + own_kv.to(tl.int64) * key_tiles * TILE * DIM
    result = tl.zeros((BM, DIM), tl.float32)
    top = tl.full((BM,), LOWEST, tl.float32)
    highest = top
    total = tl.zeros((BM,), tl.float32)
    last = tl.minimum(row + offset, num_keys - 1)  # the last key that a row sees
    before = row + offset - window
    stop = tl.minimum(num_keys, tl.minimum((tile + 1) * BM, num_rows) + offset)
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, tile * BM + offset + 1 - window) // BN * BN
    near = tl.maximum(1, tl.maximum(0, tile * BM + offset) // TILE - NEAR) * TILE
    q = tl.load(queries + (own + row[:, None]) * DIM + d[None, :], mask=there[:, None], other=0)
    for start in range(tl.maximum(begin, TILE), tl.minimum(near, stop), BN):
        key = start + n
        inside = key < num_keys
        x = tl.load(k + key[None, :] * DIM + d[:, None], mask=inside[None, :], other=0)
        scale = q_scale * tl.load(key_scales + own_kv * key_tiles + start // TILE)
        scores = tl.dot(q, x).to(tl.float32) * scale[:, None]
        seen = _seen(key, last, WINDOW, before)
        place = _column(key_columns, key_stride, sequence, key, inside, KEY_COLUMNS)
        result, total, top, highest = _add_weighed(
            result, total, top, highest, scores, seen, values, sequence, kv_head, place, inside,
            v_sequence, v_head, v_token, d,
        )  # fmt: skip
    column = _column(query_columns, query_stride, sequence, row, there, QUERY_COLUMNS)
    channel = d
    if ORDERED:
        channel = tl.load(order + kv_head * DIM + d)
    q = _load_tokens(
        given_queries, sequence, head, column, channel, there, q_sequence, q_head, q_token
    )
    # Fine tiles: the first one, then those next to the rows.
    for part in range(2):
        first = begin if part == 0 else tl.maximum(begin, near)
        end = tl.minimum(TILE, stop) if part == 0 else stop
        for start in range(first, end, BN):
            key = start + n
            inside = key < num_keys
            place = _column(key_columns, key_stride, sequence, key, inside, KEY_COLUMNS)
            x = _load_tokens(
                given_keys, sequence, kv_head, place, d, inside, k_sequence, k_head, k_token
            )
            scores = tl.dot(q, tl.trans(x), input_precision="ieee") * scaling - q_mean[:, None]
            seen = _seen(key, last, WINDOW, before)
            result, total, top, highest = _add_weighed(
                result, total, top, highest, scores, seen, values, sequence, kv_head, place,
                inside, v_sequence, v_head, v_token, d,
            )  # fmt: skip
    top = tl.where(top == LOWEST, LOWEST, top + q_mean)
    at = (own + row[:, None]) * DIM + d[None, :]
    if not FIRST:
        other = tl.load(state_top + own + row, mask=there, other=LOWEST)
        higher = tl.maximum(top, other)
        shrink, kept = tl.exp2(top - higher), tl.exp2(other - higher)
        earlier = tl.load(state_total + own + row, mask=there, other=0.0)
        total = total * shrink + earlier * kept
        earlier = tl.load(state_out + at, mask=there[:, None], other=0.0)
        result = result * shrink[:, None] + earlier * kept[:, None]
        top = higher
    if LAST:
        result = result / tl.where(total > 0.0, total, 1.0)[:, None]
        to = ((sequence.to(tl.int64) * columns + column) * heads + head)[:, None]
        tl.store(out + to * DIM + d[None, :], result.to(out.dtype.element_ty), mask=there[:, None])
    else:
        tl.store(state_out + at, result, mask=there[:, None])
        tl.store(state_top + own + row, top, mask=there)
        tl.store(state_total + own + row, total, mask=there)
