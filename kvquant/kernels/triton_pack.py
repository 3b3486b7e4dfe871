"""Quantize and pack on a GPU: keys and values are read once each, the host never waits.

Three steps, each a Triton kernel: codes and a bit mask of outliers (keys: a program a block and
head; values: a program for eight tokens of all heads, because a token's outliers are chosen among
all of its channels), outliers counted per block and head, outliers gathered behind one another. A
tile is cut into eight lanes of `block_size / 8` tokens, so that codes of different lanes meet in a
byte without a shuffle (the layout of :mod:`kvquant.packing`).

Codes and outliers equal those of :mod:`kvquant.batched_quant`; the order of a block's outliers is
that of its mask: by token modulo `block_size / 8`, channel, token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvquant.blocked_sparse import SparseSlab, count_dtype, position_dtype
from kvquant.packing import packed_bytes


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
def _pack_keys(
    x,
    zero,
    inverse,
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
):
    """One head of one block; `ROWS` tokens a lane; `WIDTH`: `DIM` up to a power of two."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < DIM
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
        value = tl.load(source + token * stride_token + column, mask=inside, other=0.0).to(
            tl.float32
        )
        wrong |= ((value - value) != 0.0).to(tl.int32)  # NaN and Inf
        normalized = (value - z) * inv
        code = _encode(normalized, midpoints, 1 << BITS)
        if OUTLIERS:
            marks |= (tl.abs(normalized) > 1.0).to(tl.int32) << lane
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
def _kth_largest(key, valid, K: tl.constexpr):
    """For each row: the K-th largest key, how many are above it, and the next one after K."""
    low = tl.full((key.shape[0], 1), -32768, dtype=tl.int32)
    for step in tl.static_range(16):
        probe = low + (1 << (15 - step))
        enough = tl.sum(((key >= probe) & valid).to(tl.int32), axis=1, keep_dims=True) >= K
        low = tl.where(enough, probe, low)
    above = tl.sum(((key > low) & valid).to(tl.int32), axis=1, keep_dims=True)
    equal = tl.sum(((key == low) & valid).to(tl.int32), axis=1, keep_dims=True)
    below = tl.max(tl.where((key < low) & valid, key, -32768), axis=1, keep_dims=True)
    return low, above, tl.where(above + equal > K, low, below)


@triton.jit
def _value_of(key, like):
    raw = tl.where(key < 0, (-key) | 0x8000, key).to(tl.int16)
    return raw.to(like.dtype, bitcast=True).to(tl.float32)


@triton.jit
def _pack_values(
    x,
    midpoints,
    codes,
    zero,
    scale,
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
    PER_SIDE: tl.constexpr,
):
    """Tokens `row + lane * ROWS` of one block, all heads; `WIDTH` channels with padding."""
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, 8)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    valid = (channel < HEADS * DIM) & (lane >= 0)
    head, inner = channel // DIM, channel % DIM
    token = row + lane * ROWS
    source = x + block * stride_block + head * stride_head + token * stride_token + inner
    raw = tl.load(source, mask=valid, other=0.0)
    value = raw.to(tl.float32)
    wrong = ((value - value) != 0.0).to(tl.int32)  # NaN and Inf
    if tl.max(tl.max(wrong, axis=1), axis=0) > 0:
        tl.store(bad, 1)
    bits = raw.to(tl.int16, bitcast=True).to(tl.int32)
    key = tl.where(bits < 0, -(bits & 0x7FFF), bits)
    if PER_SIDE > 0:
        high, above, top = _kth_largest(key, valid, PER_SIDE)
        low, below, bottom = _kth_largest(-key, valid, PER_SIDE)
        ties = ((key == high) & valid).to(tl.int32)
        chosen = (key > high) | ((ties > 0) & (tl.cumsum(ties, axis=1) <= PER_SIDE - above))
        ties = ((-key == low) & valid).to(tl.int32)
        chosen |= (-key > low) | ((ties > 0) & (tl.cumsum(ties, axis=1) <= PER_SIDE - below))
        chosen &= valid
        upper, lower = _value_of(top, raw), _value_of(-bottom, raw)
    else:
        upper = tl.max(tl.where(valid, value, float("-inf")), axis=1, keep_dims=True)
        lower = tl.min(tl.where(valid, value, float("inf")), axis=1, keep_dims=True)
    middle = ((upper + lower) * 0.5).to(raw.dtype)
    half = ((upper - lower) * 0.5).to(raw.dtype)
    spot = block * ROWS * 8 + token
    tl.store(zero + spot, middle)
    tl.store(scale + spot, half)
    width = half.to(tl.float32)
    inv = tl.where(width == 0.0, 0.0, tl.div_rn(1.0, tl.where(width == 0.0, 1.0, width)))
    code = _encode((value - middle.to(tl.float32)) * inv, midpoints, 1 << BITS)
    # Reductions over lanes put the codes of different tokens into one byte.
    line = tl.arange(0, WIDTH)
    inside = line < HEADS * DIM
    place = block * HEADS * BYTES + (line // DIM) * BYTES + row * DIM + line % DIM
    if BITS == 4:
        for m in tl.static_range(4):
            part = tl.where(lane % 4 == m, code << (4 * (lane // 4)), 0)
            byte = tl.sum(part, axis=0).to(tl.uint8)
            tl.store(codes + place + m * ROWS * DIM, byte, mask=inside)
    else:
        for m in tl.static_range(2):
            part = tl.where(lane % 2 == m, (code & 3) << (2 * (lane // 2)), 0)
            byte = tl.sum(part, axis=0).to(tl.uint8)
            tl.store(codes + place + m * ROWS * DIM, byte, mask=inside)
        if BITS == 3:
            byte = tl.sum((code >> 2) << lane, axis=0).to(tl.uint8)
            tl.store(codes + place + 2 * ROWS * DIM, byte, mask=inside)
    if PER_SIDE > 0:
        marks = tl.sum(chosen.to(tl.int32) << lane, axis=0).to(tl.uint8)
        there = (block * HEADS + line // DIM) * ROWS * DIM + row * DIM + line % DIM
        tl.store(mask + there, marks, mask=inside)


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
        x, mask, begin, positions, values, slots, *x.stride()[:3], heads, rows, dim, width
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
    _pack_keys[(blocks, heads)](
        x, zero, inverse, midpoints, codes, marks, bad, *x.stride()[:3],
        heads, rows, dim, width, bits, room, slots > 0,
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
    width = _power_of_two(heads * dim)
    _pack_values[(blocks, rows)](
        x, midpoints, codes, zero, scale, marks, bad, *x.stride()[:3],
        heads, rows, dim, width, bits, room, per_side,
        num_warps=16 if width >= 4096 else 8 if width >= 1024 else 4,
    )  # fmt: skip
    slots = blocks * size * 2 * per_side
    return codes, zero, scale, _sparse(x, marks, slots) if per_side else None
