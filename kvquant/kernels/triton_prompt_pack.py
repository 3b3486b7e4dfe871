"""Triton kernels that quantize queries, keys and values for attention with 8-bit products.

Queries and keys become INT8: a row of queries has a scale of its own, a tile of keys one scale.
Before that, the mean of a channel over the tokens is taken out of the keys: it adds the same number
to all scores of a query, which the softmax does not see. Values become FP8 (e4m3) with a scale per
channel, less their mean. :mod:`kvquant.kernels.eight_bit_attention` is the specification.

The operands of the CUDA kernel lie in memory as its products read them from shared memory
(`swizzled`): a tile is one contiguous piece, in which the 16-byte pieces of a row are permuted by
the row's number, and tiles of values are transposed, with tokens in the order in which a lane has
its weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Keys per tile and queries per tile of the operands; tokens that `_measure` reads at a time, and
# how often.
KEYS, QUERIES, TOKENS, LOOPS = 128, 64, 64, 16
SMALLEST = 1e-12  # scale of a tile or channel without content
INT8_MAX = tl.constexpr(127.0)
FP8_MAX = 448.0
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: the sum has no fraction bits


@triton.jit
def _column(columns, stride, sequence, token, there, COLUMNS: tl.constexpr):
    """Returns the columns of tokens, which are their own numbers where there is no padding."""
    if COLUMNS:
        return tl.load(columns + sequence * stride + token, mask=there, other=0).to(tl.int64)
    return token.to(tl.int64)


@triton.jit
def _int8(x):
    """Rounds to the nearest integer, ties to even, which is in the range of INT8 already."""
    return ((x + ROUNDING) - ROUNDING).to(tl.int8)


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
    """Adds up keys and values of some tokens by channel, and finds the ends of values."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + sequence * 3 + 1)
    d = tl.arange(0, DIM)
    k = keys + sequence.to(tl.int64) * k_sequence + head.to(tl.int64) * k_head
    v = values + sequence.to(tl.int64) * v_sequence + head.to(tl.int64) * v_head
    key_sum, value_sum = tl.zeros((DIM,), tl.float32), tl.zeros((DIM,), tl.float32)
    low = tl.full((DIM,), float("inf"), tl.float32)
    high = tl.full((DIM,), float("-inf"), tl.float32)
    first = part * (TOKENS * LOOPS)
    for start in range(first, tl.minimum(count, first + TOKENS * LOOPS), TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < count
        column = _column(columns, columns_stride, sequence, token, there, COLUMNS)[:, None]
        mask = there[:, None]
        x = tl.load(k + column * k_token + d[None, :], mask=mask, other=0.0).to(tl.float32)
        key_sum += tl.sum(x, axis=0)
        y = tl.load(v + column * v_token + d[None, :], mask=mask, other=0.0).to(tl.float32)
        value_sum += tl.sum(y, axis=0)
        low = tl.minimum(low, tl.min(tl.where(mask, y, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(mask, y, float("-inf")), axis=0))
    at = (sequence * tl.num_programs(1) + head) * tl.num_programs(0) + part
    to = facts + at.to(tl.int64) * (4 * DIM) + d
    tl.store(to, key_sum)
    tl.store(to + DIM, value_sum)
    tl.store(to + 2 * DIM, low)
    tl.store(to + 3 * DIM, high)


@triton.jit
def _pack_prompt_keys(
    keys,
    values,
    columns,
    counts,
    key_means,
    value_means,
    value_scales,
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
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SMALLEST: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """Quantizes a tile of keys and, for swizzled operands, of values."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + sequence * 3 + 1)
    if tile * KEYS >= count:
        return
    d = tl.arange(0, DIM)
    row = tl.arange(0, KEYS)
    token = tile * KEYS + row
    mask = (token < count)[:, None]
    column = _column(columns, columns_stride, sequence, token, token < count, COLUMNS)[:, None]
    own = (sequence * tl.num_programs(1) + head).to(tl.int64)
    at = own * tl.num_programs(0) + tile
    k = keys + sequence.to(tl.int64) * k_sequence + head.to(tl.int64) * k_head
    x = tl.load(k + column * k_token + d[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - tl.load(key_means + own * DIM + d)[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0) / INT8_MAX, SMALLEST)
    tl.store(key_scales + at, scale)
    place = _row_place(row[:, None], d[None, :], DIM, SWIZZLED)
    tl.store(packed_keys + at * (KEYS * DIM) + place, _int8(x / scale))
    if SWIZZLED:
        # Of 32 tokens a lane holds the weights 2 t, 2 t + 1 of each eight; the product takes
        # four at a time of each sixteen.
        half, lane, i = row % 32 // 16, row % 16 // 4, row % 4
        token = tile * KEYS + row // 32 * 32 + half * 16 + i // 2 * 8 + lane * 2 + i % 2
        mask = (token < count)[:, None]
        column = _column(columns, columns_stride, sequence, token, token < count, COLUMNS)
        v = values + sequence.to(tl.int64) * v_sequence + head.to(tl.int64) * v_head
        y = tl.load(v + column[:, None] * v_token + d[None, :], mask=mask, other=0.0)
        mean = tl.load(value_means + own * DIM + d)[None, :]
        y = (y.to(tl.float32) - mean) / tl.load(value_scales + own * DIM + d)[None, :]
        y = tl.where(mask, y, 0.0).to(tl.float8e4nv)
        piece = (row // 16)[None, :] ^ (d % 8)[:, None]
        place = _in_pieces(d[:, None] * KEYS + piece * 16 + (row % 16)[None, :])
        tl.store(packed_values + at * (KEYS * DIM) + place, tl.trans(y))


@triton.jit
def _pack_prompt_queries(
    queries,
    columns,
    counts,
    order,
    key_means,
    packed,
    scales,
    offsets,
    scaling,
    q_sequence,
    q_head,
    q_column,
    columns_stride,
    COLUMNS: tl.constexpr,
    ORDERED: tl.constexpr,
    OFFSETS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    SMALLEST: tl.constexpr,
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
    column = _column(columns, columns_stride, sequence, token, there, COLUMNS)[:, None]
    channel = d
    if ORDERED:
        channel = tl.load(order + head // GROUP * DIM + d)
    q = queries + sequence.to(tl.int64) * q_sequence + head.to(tl.int64) * q_head
    x = tl.load(q + column * q_column + channel[None, :], mask=there[:, None], other=0.0)
    x = x.to(tl.float32)
    own = (sequence * heads + head).to(tl.int64) * tl.num_programs(0) + tile
    scale = tl.maximum(tl.max(tl.abs(x), axis=1) / INT8_MAX, SMALLEST)
    tl.store(scales + own * QUERIES + row, scale * scaling)
    if OFFSETS:
        kv_head = sequence * (heads // GROUP) + head // GROUP
        mean = tl.load(key_means + kv_head.to(tl.int64) * DIM + d)
        tl.store(offsets + own * QUERIES + row, tl.sum(x * mean[None, :], axis=1) * scaling)
    place = _row_place(row[:, None], d[None, :], DIM, SWIZZLED)
    tl.store(packed + own * (QUERIES * DIM) + place, _int8(x / scale[:, None]))


@dataclass(frozen=True)
class Keys:
    """The keys and values that a call or a part of it attends to, quantized.

    Attributes:
        counts: int32 `[batch_size, 3]`: queries, keys, and keys that come before the first query,
            which may be negative.
        keys: INT8 `[batch_size, num_kv_heads, tiles, 128 * head_dim]`.
        key_scales: fp32 `[batch_size, num_kv_heads, tiles]`.
        key_means: fp32 `[batch_size, num_kv_heads, head_dim]`.
        values: e4m3 as bytes, the shape of `keys`; None where values stay in 16 bits.
        value_scales: fp32 `[batch_size, num_kv_heads, head_dim]`.
        value_means: The same shape.
    """

    counts: torch.Tensor
    keys: torch.Tensor
    key_scales: torch.Tensor
    key_means: torch.Tensor
    values: torch.Tensor | None
    value_scales: torch.Tensor
    value_means: torch.Tensor


@dataclass(frozen=True)
class Queries:
    """Quantized queries.

    Attributes:
        queries: INT8 `[batch_size, num_heads, tiles, 64 * head_dim]`.
        scales: fp32 `[batch_size, num_heads, tiles, 64]`, with the factor of the scores, in units
            of log2.
        offsets: The same shape: what the means of the keys add to the scores; None: not asked for.
    """

    queries: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


def _columns(columns: torch.Tensor | None, counts: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns the table of columns and its stride; without one, something that is not read."""
    return (counts, 0) if columns is None else (columns, columns.stride(0))


def pack_keys(
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor | None,
    *,
    swizzled: bool,
) -> Keys:
    """Quantizes keys and values.

    Args:
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]`, rotated, any strides of tokens.
        values: The same shape.
        counts: See :class:`Keys`.
        columns: int32 `[batch_size, kv_len]`, the column of each token of a sequence; None: their
            numbers.
        swizzled: Whether for the CUDA kernel, which takes values in 8 bits, too.
    """
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    batch, heads, length, dim = keys.shape
    table, stride = _columns(columns, counts)
    strides = (*keys.stride()[:3], *values.stride()[:3], stride)
    parts, tiles = -(-length // (TOKENS * LOOPS)), -(-length // KEYS)
    facts = keys.new_empty((batch, heads, parts, 4, dim), dtype=torch.float32)
    _measure[(parts, heads, batch)](
        keys, values, table, counts, facts, *strides, columns is not None, dim, TOKENS, LOOPS,
    )  # fmt: skip
    both = facts[:, :, :, :2].sum(2) / counts[:, 1, None, None, None].clamp(min=1)
    key_means, value_means = both[:, :, 0].contiguous(), both[:, :, 1].contiguous()
    low, high = facts[:, :, :, 2].amin(2), facts[:, :, :, 3].amax(2)
    furthest = torch.maximum(high - value_means, value_means - low)
    scales = (furthest / FP8_MAX).clamp(min=SMALLEST)
    packed = keys.new_empty((batch, heads, tiles, KEYS * dim), dtype=torch.int8)
    packed_values = packed.new_empty(packed.shape, dtype=torch.uint8) if swizzled else None
    key_scales = facts.new_empty((batch, heads, tiles))
    written = packed if packed_values is None else packed_values.view(torch.float8_e4m3fn)
    _pack_prompt_keys[(tiles, heads, batch)](
        keys, values, table, counts, key_means, value_means, scales, packed, written, key_scales,
        *strides, columns is not None, dim, KEYS, SMALLEST, swizzled, num_warps=8,
    )  # fmt: skip
    return Keys(counts, packed, key_scales, key_means, packed_values, scales, value_means)


def pack_queries(
    queries: torch.Tensor,
    keys: Keys,
    columns: torch.Tensor | None,
    scaling: float,
    *,
    order: torch.Tensor | None,
    offsets: bool,
    swizzled: bool,
) -> Queries:
    """Quantizes queries.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]`, rotated.
        keys: The keys that they will be multiplied by.
        columns: int32 `[batch_size, q_len]`, the column of each query of a sequence; None: their
            numbers.
        scaling: Factor of the scores.
        order: int32 `[num_kv_heads, head_dim]`, the channels of keys in the order in which they
            lie; None where it is their own.
        offsets: Whether softmax goes on over other keys, so that means have to be made up for.
        swizzled: Whether for the CUDA kernel.
    """
    queries = queries if queries.stride(3) == 1 else queries.contiguous()
    batch, heads, length, dim = queries.shape
    table, stride = _columns(columns, keys.counts)
    tiles = -(-length // QUERIES)
    packed = queries.new_empty((batch, heads, tiles, QUERIES * dim), dtype=torch.int8)
    scales = queries.new_empty((batch, heads, tiles, QUERIES), dtype=torch.float32)
    added = torch.empty_like(scales) if offsets else None
    _pack_prompt_queries[(tiles, heads, batch)](
        queries, table, keys.counts, keys.counts if order is None else order, keys.key_means,
        packed, scales, scales if added is None else added, scaling * math.log2(math.e),
        *queries.stride()[:3], stride, columns is not None, order is not None, offsets, dim,
        heads // keys.keys.shape[1], QUERIES, SMALLEST, swizzled,
    )  # fmt: skip
    return Queries(packed, scales, added)
