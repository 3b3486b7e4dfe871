"""Functions that the Triton packing kernels share: codes, their bytes, outliers of a block."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _popcount(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _encode(n, midpoints, BITS: tl.constexpr):
    """Returns the index of the nearest level: a binary search among the midpoints."""
    if BITS == 2:
        m0, m1, m2 = tl.load(midpoints), tl.load(midpoints + 1), tl.load(midpoints + 2)
        b1 = n > m1
        return (b1.to(tl.int32) << 1) | (n > tl.where(b1, m2, m0)).to(tl.int32)
    b2 = n > tl.load(midpoints + (1 << (BITS - 1)) - 1)
    STEP: tl.constexpr = 1 << (BITS - 2)
    low1, high1 = tl.load(midpoints + STEP - 1), tl.load(midpoints + 3 * STEP - 1)
    b1 = n > tl.where(b2, high1, low1)
    HALF: tl.constexpr = STEP // 2
    q0, q1 = tl.load(midpoints + HALF - 1), tl.load(midpoints + 3 * HALF - 1)
    q2, q3 = tl.load(midpoints + 5 * HALF - 1), tl.load(midpoints + 7 * HALF - 1)
    b0 = n > tl.where(b1, tl.where(b2, q3, q1), tl.where(b2, q2, q0))
    code = (b2.to(tl.int32) << 2) | (b1.to(tl.int32) << 1) | b0.to(tl.int32)
    if BITS == 4:
        # The last of four steps: a choice among the eight midpoints of even index.
        e0, e1 = tl.load(midpoints), tl.load(midpoints + 2)
        e2, e3 = tl.load(midpoints + 4), tl.load(midpoints + 6)
        e4, e5 = tl.load(midpoints + 8), tl.load(midpoints + 10)
        e6, e7 = tl.load(midpoints + 12), tl.load(midpoints + 14)
        lower = tl.where(b1, tl.where(b0, e3, e2), tl.where(b0, e1, e0))
        upper = tl.where(b1, tl.where(b0, e7, e6), tl.where(b0, e5, e4))
        code = (code << 1) | (n > tl.where(b2, upper, lower)).to(tl.int32)
    return code


@triton.jit
def _store_codes(out, inside, c, BITS: tl.constexpr, D8: tl.constexpr):
    """Writes the bytes of rows from the codes of their eight lanes, from address `out` on."""
    if BITS == 4:
        for i in tl.static_range(4):
            tl.store(out + i * D8, (c[i] | (c[i + 4] << 4)).to(tl.uint8), mask=inside)
    else:
        for i in tl.static_range(2):
            low = (c[i] & 3) | ((c[i + 2] & 3) << 2) | ((c[i + 4] & 3) << 4) | (c[i + 6] & 3) << 6
            tl.store(out + i * D8, low.to(tl.uint8), mask=inside)
        if BITS == 3:
            top = c[0] >> 2
            for i in tl.static_range(1, 8):
                top |= (c[i] >> 2) << i
            tl.store(out + 2 * D8, top.to(tl.uint8), mask=inside)


@triton.jit
def _emit(
    source,
    stride_token,
    marks,
    group,
    begin,
    count,
    positions,
    values,
    cursor,
    status,
    slots,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    L: tl.constexpr,
):
    """Writes the outliers of a (block, head); bit l of `marks`, int32 `[SIZE, L]`, is lane l."""
    D8: tl.constexpr = DIM // 8
    N: tl.constexpr = SIZE * L // 4
    even, odd = tl.split(tl.reshape(marks, (SIZE, L // 4, 2, 2)))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    word = tl.reshape(a | (c << 8) | (b << 16) | (d << 24), (N,)).to(tl.uint32, bitcast=True)
    number = _popcount(word)
    ends = tl.cumsum(number, axis=0)
    total = tl.sum(number, axis=0)
    base = tl.atomic_add(cursor, total)
    first = tl.minimum(base, slots)
    written = tl.minimum(base + total, slots) - first
    tl.store(begin + group, first)
    tl.store(count + group, written.to(count.dtype.element_ty))
    if written < total:
        tl.atomic_add(status, total - written)
    slot = base + ends - number
    at = tl.arange(0, N)
    token, column = at // (L // 4), (at % (L // 4)) * 4
    for _ in range(tl.max(number, axis=0)):
        rest = word & (word - 1)
        # A power of two is exact in fp32, whose exponent is the index of the bit.
        bit = ((word ^ rest).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        channel = (bit & 7) * D8 + column + (bit >> 3)
        here = (word != 0) & (slot < slots)
        value = tl.load(source + token * stride_token + channel, mask=here)
        tl.store(values + slot, value, mask=here)
        place = (token * DIM + channel).to(positions.dtype.element_ty)
        tl.store(positions + slot, place, mask=here)
        word = rest
        slot += 1


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def _max(tile):
    return tl.max(tl.max(tile, axis=1), axis=0)
