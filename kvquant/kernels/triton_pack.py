"""Quantize and pack by Triton kernels: keys and values are read once, their outliers twice.

For keys, one program per (block, head) encodes and writes outliers. For values, one program per
token selects the token's outliers among all heads, encodes it and leaves one bit per element, by
which a second kernel writes the outliers. A row is cut into eight lanes of `head_dim / 8` channels,
so that codes of different lanes meet in a byte without a shuffle (the layout of
:mod:`kvquant.formats.packing`, one row at a time). The host never waits: slots for outliers are
taken from a counter on the device.

Codes and outliers equal those of `kvquant.quantization.batched_quant`; the order of a block's
outliers is its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvquant.kernels.pack_target import PackTarget
from kvquant.kernels.triton_tiles import _emit, _encode, _max, _store_codes, _sum

# To tune: warps of the three kernels.
KEY_WARPS, VALUE_WARPS, EMIT_WARPS = 4, 4, 4
MAX_GROUPS = 256  # groups that give their two largest elements to the selection


@triton.jit
def _pack_keys(
    x,
    zero,
    inverse,
    midpoints,
    codes,
    begin,
    count,
    positions,
    values,
    cursor,
    status,
    slots,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    L: tl.constexpr,
    BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    """Packs keys of one head and block; `L`: channels per lane, up to a power of two."""
    D8: tl.constexpr = DIM // 8
    block, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, L)[None, :]
    inside = (column < D8) & (token < SIZE)
    source = x + block * stride_block + head * stride_head
    table = head * DIM + column
    marks = tl.zeros((SIZE, L), dtype=tl.int32)
    poison = tl.zeros((SIZE, L), dtype=tl.float32)
    c = ()
    for lane in tl.static_range(8):
        raw = tl.load(source + token * stride_token + lane * D8 + column, mask=inside, other=0.0)
        z = tl.load(zero + table + lane * D8, mask=column < D8, other=0.0)
        inv = tl.load(inverse + table + lane * D8, mask=column < D8, other=0.0)
        value = raw.to(tl.float32)
        poison += value * 0.0  # NaN after NaN or Inf
        n = (value - z) * inv
        c = c + (_encode(n, midpoints, BITS),)  # type: ignore[assignment]  # noqa: RUF005
        if OUTLIERS:
            marks |= ((tl.abs(n) > 1.0) & inside).to(tl.int32) << lane
    group = block * HEADS + head
    out = codes + group * (SIZE * D8 * BITS) + token * (D8 * BITS) + column
    _store_codes(out, inside, c, BITS, D8)
    if tl.max(tl.max((poison != poison).to(tl.int32), axis=1), axis=0) > 0:
        tl.store(status + 1, 1)
    if OUTLIERS:
        _emit(
            source, stride_token, marks, group, begin, count, positions, values, cursor, status,
            slots, SIZE, DIM, L,
        )  # fmt: skip


@triton.jit
def _emit_marks(
    x,
    marks,
    begin,
    count,
    positions,
    values,
    cursor,
    status,
    slots,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    L: tl.constexpr,
):
    """Writes the value outliers of one head and block by their marks."""
    D8: tl.constexpr = DIM // 8
    block, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, L)[None, :]
    group = block * HEADS + head
    place = group * (SIZE * D8) + token * D8 + column
    byte = tl.load(marks + place, mask=(column < D8) & (token < SIZE), other=0).to(tl.int32)
    source = x + block * stride_block + head * stride_head
    _emit(
        source, stride_token, byte, group, begin, count, positions, values, cursor, status,
        slots, SIZE, DIM, L,
    )  # fmt: skip


@triton.jit
def _halve(first, second):
    """Merges the two largest keys of neighbouring groups."""
    shape: tl.constexpr = (first.shape[0], first.shape[1] // 2, 2)
    a, b = tl.split(tl.reshape(first, shape))
    c, d = tl.split(tl.reshape(second, shape))
    return tl.maximum(a, b), tl.maximum(tl.minimum(a, b), tl.maximum(c, d))


@triton.jit
def _narrow(lower, upper, middle, number, K: tl.constexpr):
    """Does one step of a binary search for a bound with K keys at or above it."""
    upper = tl.where(number >= K, tl.where(number == K, middle, upper), middle - 1)
    return tl.where(number >= K, middle, lower), upper


@triton.jit
def _middle(lower, upper):
    """Returns the mean of two numbers, rounded up, without overflow."""
    return (lower | upper) - ((lower ^ upper) >> 1)


@triton.jit
def _number(above, below):
    """Puts two truth values into one word, so that one sum counts both."""
    return above.to(tl.int32) + (below.to(tl.int32) << 16)


@triton.jit
def _value_of(key, like):
    """Returns the 16-bit float of a sort key, in fp32."""
    ordered = key >> 16
    raw = tl.where(ordered < 0, (-ordered) | 0x8000, ordered).to(tl.int16)
    return raw.to(like, bitcast=True).to(tl.float32)


@triton.jit
def _pack_values(
    x,
    zero,
    scale,
    midpoints,
    codes,
    marks,
    status,
    stride_block,
    stride_head,
    stride_token,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    BITS: tl.constexpr,
    K: tl.constexpr,
    FOLDS: tl.constexpr,
):
    """Packs values of one token; `H`, `L`: heads and channels per lane, up to powers of two.

    Sort keys hold the value in the upper half and the reversed channel in the lower, so no two are
    equal. The two largest keys of each group of elements hold the K + 1 largest of all but rarely;
    a count over all elements tells, and then the search is repeated on all.
    """
    LOWEST: tl.constexpr = -2147483647
    D8: tl.constexpr = DIM // 8
    spot = tl.program_id(0).to(tl.int64)
    block, token = spot // SIZE, spot % SIZE
    head = tl.arange(0, H)[:, None]
    column = tl.arange(0, L)[None, :]
    inside = (head < HEADS) & (column < D8)
    source = x + block * stride_block + token * stride_token + head * stride_head + column
    tie = (HEADS * DIM - 1) - head * DIM - column
    poison = tl.zeros((H, L), dtype=tl.float32)
    high1 = tl.full((H, L), LOWEST, dtype=tl.int32)
    high2, low1, low2 = high1, high1, high1
    values, keys = (), ()
    for lane in tl.static_range(8):
        raw = tl.load(source + lane * D8, mask=inside, other=0.0)
        values = values + (raw,)  # type: ignore[assignment]  # noqa: RUF005
        poison += raw.to(tl.float32) * 0.0
        bits = raw.to(tl.int16, bitcast=True).to(tl.int32)
        ordered = tl.where(bits < 0, -(bits & 0x7FFF), bits) << 16
        key = ordered + (tie - lane * D8)
        keys = keys + (key,)  # type: ignore[assignment]  # noqa: RUF005
        mirror = (tie - lane * D8) - ordered
        if (H != HEADS) or (L != D8):
            key = tl.where(inside, key, LOWEST)
            mirror = tl.where(inside, mirror, LOWEST)
        high2 = tl.maximum(high2, tl.minimum(high1, key))
        high1 = tl.maximum(high1, key)
        low2 = tl.maximum(low2, tl.minimum(low1, mirror))
        low1 = tl.maximum(low1, mirror)
    top, bottom = _max(high1), _max(low1)
    high, low, next_high, next_low = LOWEST, LOWEST, top, bottom
    if K > 0:
        for _ in tl.static_range(FOLDS):
            high1, high2 = _halve(high1, high2)
            low1, low2 = _halve(low1, low2)
        high, low, end_high, end_low = LOWEST, LOWEST, top, bottom
        while (high < end_high) | (low < end_low):
            a, b = _middle(high, end_high), _middle(low, end_low)
            n = _sum(_number(high1 >= a, low1 >= b) + _number(high2 >= a, low2 >= b))
            high, end_high = _narrow(high, end_high, a, n & 0xFFFF, K)
            low, end_low = _narrow(low, end_low, b, n >> 16, K)
        next_high = _max(
            tl.maximum(tl.where(high1 < high, high1, LOWEST), tl.where(high2 < high, high2, LOWEST))
        )
        next_low = _max(
            tl.maximum(tl.where(low1 < low, low1, LOWEST), tl.where(low2 < low, low2, LOWEST))
        )
        found = tl.zeros((H, L), dtype=tl.int32)
        for lane in tl.static_range(8):
            mirror = 2 * (tie - lane * D8) - keys[lane]
            found += _number((keys[lane] >= next_high) & inside, (mirror >= next_low) & inside)
        n = _sum(found)
        if n != (K + 1) * 65537:  # rare: more than two of a group are among the largest
            high, low, end_high, end_low = LOWEST, LOWEST, top, bottom
            while (high < end_high) | (low < end_low):
                a, b = _middle(high, end_high), _middle(low, end_low)
                found = tl.zeros((H, L), dtype=tl.int32)
                for lane in tl.static_range(8):
                    mirror = 2 * (tie - lane * D8) - keys[lane]
                    found += _number((keys[lane] >= a) & inside, (mirror >= b) & inside)
                n = _sum(found)
                high, end_high = _narrow(high, end_high, a, n & 0xFFFF, K)
                low, end_low = _narrow(low, end_low, b, n >> 16, K)
            best = tl.full((H, L), LOWEST, dtype=tl.int32)
            least = best
            for lane in tl.static_range(8):
                mirror = 2 * (tie - lane * D8) - keys[lane]
                best = tl.maximum(best, tl.where((keys[lane] < high) & inside, keys[lane], LOWEST))
                least = tl.maximum(least, tl.where((mirror < low) & inside, mirror, LOWEST))
            next_high, next_low = _max(best), _max(least)
    kind: tl.constexpr = x.dtype.element_ty
    upper = _value_of(next_high, kind)
    # The mirrored key's upper half is the negated value.
    lower = 0.0 - _value_of(next_low, kind)
    middle = ((upper + lower) * 0.5).to(kind)
    half = ((upper - lower) * 0.5).to(kind)
    tl.store(zero + spot, middle)
    tl.store(scale + spot, half)
    z, width = middle.to(tl.float32), half.to(tl.float32)
    inv = tl.where(width == 0.0, 0.0, tl.div_rn(1.0, tl.where(width == 0.0, 1.0, width)))
    c = ()
    chosen = tl.zeros((H, L), dtype=tl.int32)
    for lane in tl.static_range(8):
        c = c + (_encode((values[lane].to(tl.float32) - z) * inv, midpoints, BITS),)  # type: ignore[assignment]  # noqa: RUF005
        if K > 0:
            mirror = 2 * (tie - lane * D8) - keys[lane]
            chosen |= ((keys[lane] >= high) | (mirror >= low)).to(tl.int32) << lane
    group = block * HEADS + head
    row = group * SIZE + token
    _store_codes(codes + row * (D8 * BITS) + column, inside, c, BITS, D8)
    if K > 0:
        tl.store(marks + row * D8 + column, chosen.to(tl.uint8), mask=inside)
    if _max((poison != poison).to(tl.int32)) > 0:
        tl.store(status + 1, 1)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _slab(target: PackTarget) -> tuple[torch.Tensor | int, ...]:
    """Returns the outlier arguments of a kernel; without outliers any tensor stands for each."""
    if target.values is None:
        return (target.codes,) * 5 + (target.status, 0)
    parts = (target.begin, target.count, target.positions, target.values, target.cursor)
    assert all(t is not None for t in parts)
    return (*parts, target.status, target.values.numel())  # type: ignore[return-value]


def pack_keys(
    x: torch.Tensor,
    zero: torch.Tensor,
    inverse: torch.Tensor,
    midpoints: torch.Tensor,
    bits: int,
    target: PackTarget,
) -> None:
    """Writes codes and outliers of key blocks.

    Args:
        x: fp16/bf16 `[blocks, num_heads, block_size, head_dim]`, any strides but the last.
        zero: fp32 `[num_heads, head_dim]`.
        inverse: fp32 `[num_heads, head_dim]`, 1 / scale, or infinity.
        midpoints: fp32 `[2**bits - 1]`.
        bits: 2, 3 or 4.
        target: Where to; no outliers are kept apart if it has no `values`.
    """
    target.check(x.shape, x.dtype, bits)
    blocks, heads, size, dim = x.shape
    _pack_keys[(heads, blocks)](
        x, zero, inverse, midpoints, target.codes, *_slab(target), *x.stride()[:3],
        heads, size, dim, _power_of_two(dim // 8), bits, target.values is not None,
        num_warps=KEY_WARPS,
    )  # fmt: skip


def pack_values(
    x: torch.Tensor,
    midpoints: torch.Tensor,
    bits: int,
    per_side: int,
    target: PackTarget,
    zero_out: torch.Tensor,
    scale_out: torch.Tensor,
) -> None:
    """Writes codes, zero, scale and outliers of value blocks.

    Args:
        x: fp16/bf16 `[blocks, num_heads, block_size, head_dim]`, any strides but the last.
        midpoints: fp32 `[2**bits - 1]`.
        bits: 2, 3 or 4.
        per_side: Outliers at each end of a token, `2 * per_side < num_heads * head_dim`.
        target: Where to.
        zero_out: 16-bit `[blocks, block_size]`, contiguous.
        scale_out: The same.
    """
    target.check(x.shape, x.dtype, bits)
    assert zero_out.is_contiguous() and scale_out.is_contiguous()
    blocks, heads, size, dim = x.shape
    h, lane, folds = _power_of_two(heads), _power_of_two(dim // 8), 0
    while h * lane >> folds > MAX_GROUPS and lane >> folds > 1:
        folds += 1
    marks = target.codes
    if per_side:
        marks = torch.empty((blocks, heads, size, dim // 8), dtype=torch.uint8, device=x.device)
    _pack_values[(blocks * size,)](
        x, zero_out, scale_out, midpoints, target.codes, marks, target.status, *x.stride()[:3],
        heads, size, dim, h, lane, bits, per_side, folds, num_warps=VALUE_WARPS,
    )  # fmt: skip
    if per_side:
        _emit_marks[(heads, blocks)](
            x, marks, *_slab(target), *x.stride()[:3],
            heads, size, dim, lane, num_warps=EMIT_WARPS,
        )  # fmt: skip
