"""Triton kernels of attention over keys and values that come part by part (`triton_attention`).

Online softmax as in FlashAttention (Dao et al., arXiv 2205.14135); between parts the running
maximum, sum and fp32 output of each row lie in memory. The query heads of a group are rows of one
tile, so a key is read once for all of them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _over_keys(
    out, top, total, q, k, v, stride_k, stride_v, lo, hi, last, valid, scale, cap, steepness,
    BN: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr, VALID: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Attends to the keys `[lo, hi)`; with MASK, a row sees those up to `last`.

    With CAP, scores become `cap * tanh(scores * steepness / (2 log2(e)))` before `scale`.
    """
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
        if CAP:
            scores = cap - 2.0 * cap / (tl.exp2(scores * steepness) + 1.0)
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
    sink_logits,
    base,
    places,
    splits,
    scale,
    cap,
    steepness,
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
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Attends with a tile of rows (column, head of the group) to a split of a part's keys.

    With ORDERED the channels of keys lie in the head's `order`, in which queries are read, too.
    With LAST the result is written, otherwise the running state. With SINKS, each row of the first
    part's first split has seen the logit of its head, whose value is zero, before any key.
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
        if SINKS:
            logit = tl.load(sink_logits + head * GROUP + member).to(tl.float32) * LOG2_E
            top = tl.where(split == 0, logit, top)
            total = tl.where(split == 0, 1.0, total)
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
            cap, steepness, BN, DIM, False, False, CAP,
        )  # fmt: skip
    out, top, total = _over_keys(
        out, top, total, q, k, v, k_token, v_token, full, hi, last, valid, scale,
        cap, steepness, BN, DIM, True, VALID, CAP,
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
