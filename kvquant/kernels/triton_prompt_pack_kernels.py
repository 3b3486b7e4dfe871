"""Triton kernels that quantize for attention with 8-bit products (`triton_prompt_pack`)."""

from __future__ import annotations

import triton
import triton.language as tl

from kvquant.kernels.eight_bit_attention import LARGEST

INT8_MAX = tl.constexpr(LARGEST["int8"])
FP8_MAX = tl.constexpr(LARGEST["fp8"])
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: the sum has no fraction bits


@triton.jit
def _column(columns, stride, sequence, token, there, COLUMNS: tl.constexpr):
    """Returns the columns of tokens, which are their own numbers where there is no padding."""
    if COLUMNS:
        return tl.load(columns + sequence * stride + token, mask=there, other=0).to(tl.int64)
    return token.to(tl.int64)


@triton.jit
def _load_tokens(data, sequence, head, column, channel, there, of_sequence, of_head, of_token):
    """Loads channels of a head's tokens `[tokens, channels]`, zeros where there is none."""
    own = data + sequence.to(tl.int64) * of_sequence + head.to(tl.int64) * of_head
    at = own + column[:, None] * of_token + channel[None, :]
    return tl.load(at, mask=there[:, None], other=0.0)


@triton.jit
def _int8(x):
    """Rounds to the nearest integer, ties to even, which is in the range of INT8 already."""
    return ((x + ROUNDING) - ROUNDING).to(tl.int8)


@triton.jit
def _write_int8(at, second, x, UNITS: tl.constexpr, RESTS: tl.constexpr):
    """Writes integers next to numbers and, with RESTS, what they left over in smaller units."""
    near = _int8(x)
    tl.store(at, near)
    if RESTS:
        tl.store(at + second, _int8((x - near.to(tl.float32)) * UNITS))


@triton.jit
def _inverse(top, largest, SMALLEST: tl.constexpr):
    """Returns by what numbers up to `top` are multiplied, so that they end at `largest`."""
    return tl.where(top > SMALLEST, largest / tl.maximum(top, SMALLEST), 0.0)


@triton.jit
def _in_pieces(place):
    """Says of `[rows, bytes]` that 16 bytes of a row lie together, which are written at once."""
    return tl.max_contiguous(tl.multiple_of(place, [1, 16]), [1, 16])


@triton.jit
def _row_place(row, channel, DIM: tl.constexpr, SWIZZLED: tl.constexpr):
    """Returns the bytes of the channels of rows in a tile."""
    piece = channel // 16
    if SWIZZLED:
        turn = row % 8 if DIM == 128 else row // 2 % 4
        piece = piece ^ turn
    return _in_pieces(row * DIM + piece * 16 + channel % 16)


@triton.jit
def _measure(
    keys,
    values,
    columns,
    counts,
    facts,
    k_sequence,
    k_head,
    k_token,
    v_sequence,
    v_head,
    v_token,
    columns_stride,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """Adds up the keys of some tokens by channel, and finds the largest values."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + sequence * 3 + 1)
    d = tl.arange(0, DIM)
    total, largest = tl.zeros((DIM,), tl.float32), tl.zeros((DIM,), tl.float32)
    # Not a number where some value is not finite, which maxima leave out on a GPU.
    broken = tl.zeros((DIM,), tl.float32)
    first = part * (TOKENS * LOOPS)
    for start in range(first, tl.minimum(count, first + TOKENS * LOOPS), TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < count
        column = _column(columns, columns_stride, sequence, token, there, COLUMNS)
        x = _load_tokens(keys, sequence, head, column, d, there, k_sequence, k_head, k_token)
        total += tl.sum(x.to(tl.float32), axis=0)
        y = _load_tokens(values, sequence, head, column, d, there, v_sequence, v_head, v_token)
        y = tl.abs(y.to(tl.float32))
        largest = tl.maximum(largest, tl.max(y, axis=0))
        broken += 0.0 * tl.sum(y, axis=0)
    at = (sequence * tl.num_programs(1) + head) * tl.num_programs(0) + part
    tl.store(facts + at.to(tl.int64) * (2 * DIM) + d, total)
    tl.store(facts + at.to(tl.int64) * (2 * DIM) + DIM + d, largest + broken)


@triton.jit
def _conclude(
    facts,
    counts,
    signs,
    means,
    rotated_means,
    largest_values,
    value_scales,
    parts,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ROOT: tl.constexpr,
):
    """Puts the facts of all parts together, and rotates the means of keys."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    own = (sequence * tl.num_programs(0) + head).to(tl.int64)
    count = tl.maximum(tl.load(counts + sequence * 3 + 1), 1).to(tl.float32)
    d, row = tl.arange(0, DIM), tl.arange(0, ROWS)
    mine = facts + own * parts * (2 * DIM)
    largest, rotated = tl.zeros((DIM,), tl.float32), tl.zeros((DIM,), tl.float32)
    broken = tl.zeros((DIM,), tl.float32)  # as in `_measure`
    part = tl.arange(0, PARTS)[:, None]
    for start in range(0, parts, PARTS):
        at, there = (start + part) * (2 * DIM), start + part < parts
        found = tl.load(mine + at + DIM + d[None, :], mask=there, other=0.0)
        largest = tl.maximum(largest, tl.max(found, axis=0))
        broken += 0.0 * tl.sum(found, axis=0)
    largest += broken
    # A few channels at a time, each of which adds its row of the matrix.
    for first in tl.static_range(0, DIM, ROWS):
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, parts, PARTS):
            at, there = (start + part) * (2 * DIM), start + part < parts
            found = tl.load(mine + at + first + row[None, :], mask=there, other=0.0)
            total += tl.sum(found, axis=0)
        mean = total / count
        tl.store(means + own * DIM + first + row, mean)
        turned = tl.load(signs + (first + row)[:, None] * DIM + d[None, :]).to(tl.float32)
        rotated += tl.sum(turned * mean[:, None], axis=0)
    tl.store(rotated_means + own * DIM + d, rotated / ROOT)
    tl.store(largest_values + own * DIM + d, largest)
    tl.store(value_scales + own * DIM + d, largest / FP8_MAX)


@triton.jit
def _pack_prompt_keys(
    keys,
    values,
    columns,
    counts,
    signs,
    rotated_means,
    largest_values,
    packed_keys,
    packed_values,
    key_scales,
    k_sequence,
    k_head,
    k_token,
    v_sequence,
    v_head,
    v_token,
    columns_stride,
    second,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROOT: tl.constexpr,
    UNITS: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """Quantizes a tile of keys and, for swizzled operands, of values, with second numbers."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + sequence * 3 + 1)
    if tile * TILE >= count:
        return
    d = tl.arange(0, DIM)
    row = tl.arange(0, TILE)
    token = tile * TILE + row
    there = token < count
    column = _column(columns, columns_stride, sequence, token, there, COLUMNS)
    own = (sequence * tl.num_programs(1) + head).to(tl.int64)
    at = own * tl.num_programs(0) + tile
    x = _load_tokens(keys, sequence, head, column, d, there, k_sequence, k_head, k_token)
    x = tl.dot(x, tl.load(signs + d[:, None] * DIM + d[None, :]), input_precision="ieee")
    x = x / ROOT - tl.load(rotated_means + own * DIM + d)[None, :]
    x = tl.where(there[:, None], x, 0.0)
    top = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    broken = 0.0 * tl.sum(tl.sum(x, axis=1), axis=0)  # not a number if some key is not finite
    tl.store(key_scales + at, top / INT8_MAX + broken)
    place = _row_place(row[:, None], d[None, :], DIM, SWIZZLED)
    x = x * _inverse(top, INT8_MAX, SMALLEST)
    _write_int8(packed_keys + at * (TILE * DIM) + place, second, x, UNITS, SWIZZLED)
    if SWIZZLED:
        # Of 32 tokens a lane holds the weights 2 t, 2 t + 1 of each eight; the product takes
        # four at a time of each sixteen.
        half, lane, i = row % 32 // 16, row % 16 // 4, row % 4
        token = tile * TILE + row // 32 * 32 + half * 16 + i // 2 * 8 + lane * 2 + i % 2
        there = token < count
        column = _column(columns, columns_stride, sequence, token, there, COLUMNS)
        y = _load_tokens(values, sequence, head, column, d, there, v_sequence, v_head, v_token)
        largest = tl.load(largest_values + own * DIM + d)
        y = y.to(tl.float32) * _inverse(largest, FP8_MAX, SMALLEST)[None, :]
        y = tl.clamp(y, -FP8_MAX, FP8_MAX)
        piece = (row // 16)[None, :] ^ (d % 8)[:, None]
        place = _in_pieces(d[:, None] * TILE + piece * 16 + (row % 16)[None, :])
        to = packed_values + at * (TILE * DIM) + place
        near = y.to(tl.float8e4nv)
        tl.store(to, tl.trans(near))
        tl.store(to + second, tl.trans((y - near.to(tl.float32)).to(tl.float8e4nv)))


@triton.jit
def _pack_prompt_queries(
    queries,
    columns,
    counts,
    order,
    signs,
    key_means,
    packed,
    scales,
    offsets,
    scaling,
    q_sequence,
    q_head,
    q_column,
    columns_stride,
    second,
    COLUMNS: tl.constexpr,
    ORDERED: tl.constexpr,
    OFFSETS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROOT: tl.constexpr,
    UNITS: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """Quantizes a tile of queries, and finds what the means of the keys add to their scores."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    count = tl.load(counts + sequence * 3)
    if tile * QUERIES >= count:
        return
    d = tl.arange(0, DIM)
    row = tl.arange(0, QUERIES)
    token = tile * QUERIES + row
    there = token < count
    column = _column(columns, columns_stride, sequence, token, there, COLUMNS)
    channel = d
    if ORDERED:
        channel = tl.load(order + head // GROUP * DIM + d)
    given = _load_tokens(
        queries, sequence, head, column, channel, there, q_sequence, q_head, q_column
    )
    x = tl.dot(given, tl.load(signs + d[:, None] * DIM + d[None, :]), input_precision="ieee")
    x = x / ROOT
    own = (sequence * heads + head).to(tl.int64) * tl.num_programs(0) + tile
    top = tl.max(tl.abs(x), axis=1)
    broken = 0.0 * tl.sum(x, axis=1)  # not a number if the query is not finite
    tl.store(scales + own * QUERIES + row, top * (scaling / INT8_MAX) + broken)
    if OFFSETS:
        kv_head = sequence * (heads // GROUP) + head // GROUP
        mean = tl.load(key_means + kv_head.to(tl.int64) * DIM + d)
        added = tl.sum(given.to(tl.float32) * mean[None, :], axis=1)
        tl.store(offsets + own * QUERIES + row, added * scaling)
    place = _row_place(row[:, None], d[None, :], DIM, SWIZZLED)
    x = x * _inverse(top, INT8_MAX, SMALLEST)[:, None]
    _write_int8(packed + own * (QUERIES * DIM) + place, second, x, UNITS, SWIZZLED)
