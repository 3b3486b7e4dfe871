"""Quantize and pack on a GPU: keys are read once, values twice, and outliers once more.

Steps, each a Triton kernel: for values, a program a token finds the token's outliers and range
among all heads; a program a block and head writes codes and a bit mask of outliers; outliers are
counted, then gathered behind one another. The host never waits. A tile is cut into eight lanes of
`block_size / 8` tokens, so that codes of different lanes meet in a byte without a shuffle (the
layout of :mod:`kvquant.packing`).

Codes and outliers equal those of :mod:`kvquant.batched_quant`; the order of a block's outliers is
that of its mask: by token modulo `block_size / 8`, channel, token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvquant.blocked_sparse import SparseSlab, count_dtype, position_dtype
from kvquant.packing import packed_bytes

# The fastest of 1, 2, 4 and 8 on one H100 80GB (32 heads of 128, blocks of 64).
SELECT_WARPS, PACK_WARPS, GATHER_WARPS = 4, 8, 2


@triton.jit
def _popcount(byte):
    half = byte - ((byte >> 1) & 0x55)
    quarter = (half & 0x33) + ((half >> 2) & 0x33)
    return (quarter + (quarter >> 4)) & 0x0F


@triton.jit
def _encode(normalized, midpoints, LEVELS: tl.constexpr):
    """Index of the nearest level: the number of midpoints below."""
    code = (normalized > tl.load(midpoints)).to(tl.int32)
    for i in tl.static_range(1, LEVELS - 1):
        code += (normalized > tl.load(midpoints + i)).to(tl.int32)
    return code


@triton.jit
def _sort_key(raw):
    """int32 that orders as the 16-bit floats do; -0 equals 0."""
    bits = raw.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, -(bits & 0x7FFF), bits)


@triton.jit
def _pack_blocks(
    x,
    zero,
    inverse,
    limits,
    midpoints,
    codes,
    mask,
    bad,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    OUTLIERS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One head of one block; `ROWS` tokens a lane; `WIDTH`: `DIM` up to a power of two.

    Keys: zero and 1 / scale a channel, outliers beyond the range. Values: both a token, outliers by
    the token's limits (smallest key above, last channel of a tie, for both ends).
    """
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < DIM
    if not VALUES:
        z = tl.load(zero + head * DIM + column, mask=inside, other=0.0)
        inv = tl.load(inverse + head * DIM + column, mask=inside, other=0.0)
    source = x + block * stride_block + head * stride_head
    out = codes + (block * HEADS + head) * BYTES
    place = row * DIM + column
    marks = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    top = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    first = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    second = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    third = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    fourth = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    wrong = tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    for lane in tl.static_range(8):
        token = lane * ROWS + row
        raw = tl.load(source + token * stride_token + column, mask=inside, other=0.0)
        value = raw.to(tl.float32)
        wrong |= ((value - value) != 0.0).to(tl.int32)  # NaN and Inf
        if VALUES:
            spot = block * ROWS * 8 + token
            z = tl.load(zero + spot).to(tl.float32)
            inv = tl.load(inverse + spot)
        normalized = (value - z) * inv
        code = _encode(normalized, midpoints, 1 << BITS)
        if OUTLIERS:
            if VALUES:
                key = _sort_key(raw)
                channel = head * DIM + column
                high, high_last = tl.load(limits + 4 * spot), tl.load(limits + 4 * spot + 1)
                low, low_last = tl.load(limits + 4 * spot + 2), tl.load(limits + 4 * spot + 3)
                chosen = (key > high) | ((key == high) & (channel <= high_last))
                chosen |= (-key > low) | ((-key == low) & (channel <= low_last))
            else:
                chosen = tl.abs(normalized) > 1.0
            marks |= chosen.to(tl.int32) << lane
        if BITS == 4:
            part = code << (4 * (lane // 4))
            if lane % 4 == 0:
                first |= part
            if lane % 4 == 1:
                second |= part
            if lane % 4 == 2:
                third |= part
            if lane % 4 == 3:
                fourth |= part
        else:
            part = (code & 3) << (2 * (lane // 2))
            if lane % 2 == 0:
                first |= part
            else:
                second |= part
            if BITS == 3:
                top |= (code >> 2) << lane
    tl.store(out + place, first.to(tl.uint8), mask=inside)
    tl.store(out + ROWS * DIM + place, second.to(tl.uint8), mask=inside)
    if BITS == 4:
        tl.store(out + 2 * ROWS * DIM + place, third.to(tl.uint8), mask=inside)
        tl.store(out + 3 * ROWS * DIM + place, fourth.to(tl.uint8), mask=inside)
    if BITS == 3:
        tl.store(out + 2 * ROWS * DIM + place, top.to(tl.uint8), mask=inside)
    if OUTLIERS:
        marked = mask + (block * HEADS + head) * ROWS * DIM
        tl.store(marked + place, marks.to(tl.uint8), mask=inside)
    if tl.max(tl.max(wrong, axis=1), axis=0) > 0:
        tl.store(bad, 1)


@triton.jit
def _value_of(key, like):
    raw = tl.where(key < 0, (-key) | 0x8000, key).to(tl.int16)
    return raw.to(like.dtype, bitcast=True).to(tl.float32)


@triton.jit
def _next_key(key, valid, threshold, equal, above, K: tl.constexpr):
    """The key of rank K + 1: another one like the threshold, or the next below it."""
    below = tl.max(tl.where((key < threshold) & valid, key, -32768), axis=0)
    return tl.where(above + equal > K, threshold, below)


@triton.jit
def _last_tie(key, valid, threshold, equal, needed, channel, WIDTH: tl.constexpr):
    """Channel of the `needed`-th key at the threshold, counted from the lowest channel."""
    last = WIDTH - 1
    if equal > needed:  # rare: more ties than places
        tied = ((key == threshold) & valid).to(tl.int32)
        rank = tl.cumsum(tied, axis=0)
        last = tl.max(tl.where((tied > 0) & (rank <= needed), channel, -1), axis=0)
    return last


@triton.jit
def _select_values(
    x,
    zero,
    scale,
    inverse,
    limits,
    stride_block,
    stride_head,
    stride_token,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
):
    """One token, all heads: its K largest and smallest elements, and the range of the others."""
    spot = tl.program_id(0).to(tl.int64)
    block, token = spot // SIZE, spot % SIZE
    channel = tl.arange(0, WIDTH)
    valid = channel < CHANNELS
    place = (channel // DIM) * stride_head + channel % DIM
    raw = tl.load(x + block * stride_block + token * stride_token + place, mask=valid, other=0.0)
    if K > 0:
        key = _sort_key(raw)
        # Binary search for the K-th largest and smallest key; both counts in one reduction.
        high, low = -32768, -32768
        for step in tl.static_range(16):
            bit = 1 << (15 - step)
            over = ((key >= high + bit) & valid).to(tl.int32)
            under = ((-key >= low + bit) & valid).to(tl.int32)
            counts = tl.sum(over + (under << 16), axis=0)
            high = tl.where((counts & 0xFFFF) >= K, high + bit, high)
            low = tl.where((counts >> 16) >= K, low + bit, low)
        counts = tl.sum(
            ((key > high) & valid).to(tl.int32) + (((-key > low) & valid).to(tl.int32) << 16),
            axis=0,
        )
        above, below = counts & 0xFFFF, counts >> 16
        counts = tl.sum(
            ((key == high) & valid).to(tl.int32) + (((-key == low) & valid).to(tl.int32) << 16),
            axis=0,
        )
        high_ties, low_ties = counts & 0xFFFF, counts >> 16
        upper = _value_of(_next_key(key, valid, high, high_ties, above, K), raw)
        lower = _value_of(-_next_key(-key, valid, low, low_ties, below, K), raw)
        tl.store(limits + 4 * spot, high)
        tl.store(limits + 4 * spot + 2, low)
        last = _last_tie(key, valid, high, high_ties, K - above, channel, WIDTH)
        tl.store(limits + 4 * spot + 1, last)
        last = _last_tie(-key, valid, low, low_ties, K - below, channel, WIDTH)
        tl.store(limits + 4 * spot + 3, last)
    else:
        value = raw.to(tl.float32)
        upper = tl.max(tl.where(valid, value, float("-inf")), axis=0)
        lower = tl.min(tl.where(valid, value, float("inf")), axis=0)
    middle = ((upper + lower) * 0.5).to(raw.dtype)
    half = ((upper - lower) * 0.5).to(raw.dtype)
    width = half.to(tl.float32)
    tl.store(zero + spot, middle)
    tl.store(scale + spot, half)
    safe = tl.where(width == 0.0, 1.0, width)
    tl.store(inverse + spot, tl.where(width == 0.0, 0.0, tl.div_rn(1.0, safe)))


@triton.jit
def _count(mask, counts, ELEMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Outliers of one block and head."""
    group = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    byte = tl.load(mask + group * ELEMENTS + at, mask=at < ELEMENTS, other=0).to(tl.int32)
    tl.store(counts + group, tl.sum(_popcount(byte), axis=0))


@triton.jit
def _gather(
    x,
    mask,
    begin,
    positions,
    values,
    slots,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes positions and values of one block and head; what finds no slot is left out."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, WIDTH)
    group = block * HEADS + head
    byte = tl.load(mask + group * ROWS * DIM + at, mask=at < ROWS * DIM, other=0).to(tl.int32)
    count = _popcount(byte)
    start = tl.load(begin + group) + tl.cumsum(count, axis=0) - count
    row, column = at // DIM, at % DIM
    source = x + block * stride_block + head * stride_head + column
    for lane in tl.static_range(8):
        token = lane * ROWS + row
        slot = start + _popcount(byte & ((1 << lane) - 1))
        here = (((byte >> lane) & 1) > 0) & (slot < slots)
        value = tl.load(source + token * stride_token, mask=here)
        tl.store(values + slot, value, mask=here)
        tl.store(positions + slot, (token * DIM + column).to(positions.dtype.element_ty), mask=here)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def supported(x: torch.Tensor) -> bool:
    """Whether the kernels take blocks `[blocks, num_heads, block_size, head_dim]`."""
    _, _, size, _ = x.shape
    return size % 8 == 0 and _power_of_two(size // 8) == size // 8 and x.stride(3) == 1


def _sparse(x: torch.Tensor, mask: torch.Tensor, slots: int) -> SparseSlab:
    blocks, heads, size, dim = x.shape
    rows, groups = size // 8, blocks * heads
    counts = torch.empty(groups, dtype=torch.int32, device=x.device)
    width = _power_of_two(rows * dim)
    _count[(groups,)](mask, counts, rows * dim, width)
    ends = counts.cumsum(0, dtype=torch.int32)
    begin = ends - counts
    positions = torch.empty(slots, dtype=position_dtype(size * dim), device=x.device)
    values = torch.empty(slots, dtype=x.dtype, device=x.device)
    _gather[(blocks, heads)](
        x,
        mask,
        begin,
        positions,
        values,
        slots,
        *x.stride()[:3],
        heads,
        rows,
        dim,
        width,
        num_warps=GATHER_WARPS,
    )
    excess = (ends[-1] - slots).clamp_(min=0)
    begin = begin.clamp_(max=slots)
    counts = (ends.clamp_(max=slots) - begin).to(count_dtype(size * dim))
    shape = (blocks, heads, size, dim)
    table = (blocks, heads)
    return SparseSlab(begin.view(table), counts.view(table), positions, values, shape, excess)


def pack_keys(
    x: torch.Tensor,
    zero: torch.Tensor,
    inverse: torch.Tensor,
    midpoints: torch.Tensor,
    bits: int,
    slots: int,
    bad: torch.Tensor,
) -> tuple[torch.Tensor, SparseSlab | None]:
    """Codes and outliers of key blocks.

    Args:
        x: fp16/bf16 `[blocks, num_heads, block_size, head_dim]`, any strides but the last.
        zero: fp32 `[num_heads, head_dim]`.
        inverse: fp32 `[num_heads, head_dim]`, 1 / scale.
        midpoints: fp32 `[2**bits - 1]`.
        bits: 2, 3 or 4.
        slots: Room for outliers; 0: none are kept apart.
        bad: int32 `[1]`, set to 1 if the input holds NaN or Inf.

    Returns:
        uint8 codes `[blocks, num_heads, bytes]`, and the outliers.
    """
    blocks, heads, size, dim = x.shape
    rows, width = size // 8, _power_of_two(dim)
    room = packed_bytes(size * dim, bits)
    codes = torch.empty((blocks, heads, room), dtype=torch.uint8, device=x.device)
    marks = torch.empty(
        (blocks, heads, rows * dim) if slots else (1,), dtype=torch.uint8, device=x.device
    )
    _pack_blocks[(blocks, heads)](
        x, zero, inverse, marks, midpoints, codes, marks, bad, *x.stride()[:3],
        heads, rows, dim, width, bits, room, slots > 0, False, num_warps=PACK_WARPS,
    )  # fmt: skip
    return codes, _sparse(x, marks, slots) if slots else None


def pack_values(
    x: torch.Tensor, midpoints: torch.Tensor, bits: int, per_side: int, bad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SparseSlab | None]:
    """Codes, zero, scale and outliers of value blocks.

    Args:
        x: fp16/bf16 `[blocks, num_heads, block_size, head_dim]`, any strides but the last.
        midpoints: fp32 `[2**bits - 1]`.
        bits: 2, 3 or 4.
        per_side: Outliers at each end of a token.
        bad: int32 `[1]`, set to 1 if the input holds NaN or Inf.

    Returns:
        uint8 codes `[blocks, num_heads, bytes]`, 16-bit zero and scale `[blocks, block_size]`, and
        the outliers.
    """
    blocks, heads, size, dim = x.shape
    rows, room = size // 8, packed_bytes(size * dim, bits)
    codes = torch.empty((blocks, heads, room), dtype=torch.uint8, device=x.device)
    zero = torch.empty((blocks, size), dtype=x.dtype, device=x.device)
    scale = torch.empty_like(zero)
    marks = torch.empty(
        (blocks, heads, rows * dim) if per_side else (1,), dtype=torch.uint8, device=x.device
    )
    inverse = torch.empty((blocks, size), dtype=torch.float32, device=x.device)
    limits = torch.empty((blocks, size, 4), dtype=torch.int32, device=x.device)
    _select_values[(blocks * size,)](
        x, zero, scale, inverse, limits, *x.stride()[:3],
        size, heads * dim, dim, _power_of_two(heads * dim), per_side, num_warps=SELECT_WARPS,
    )  # fmt: skip
    _pack_blocks[(blocks, heads)](
        x, zero, inverse, limits, midpoints, codes, marks, bad, *x.stride()[:3],
        heads, rows, dim, _power_of_two(dim), bits, room, per_side > 0, True, num_warps=PACK_WARPS,
    )  # fmt: skip
    slots = blocks * size * 2 * per_side
    return codes, zero, scale, _sparse(x, marks, slots) if per_side else None
