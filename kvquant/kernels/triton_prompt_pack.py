"""Quantizes queries, keys and values for attention with 8-bit products, by Triton kernels.

:mod:`kvquant.kernels.eight_bit_attention` is the specification: keys less their mean and queries
are rotated by a Hadamard matrix and become INT8, a row of queries or a tile of keys with one scale;
values become FP8 (e4m3) with a scale per channel. The rotation is a product with a matrix of ones
and minus ones, which is exact but for the fp32 sums.

The operands of the CUDA kernel lie in memory as its products read them from shared memory
(`swizzled`): a tile is one contiguous piece, in which the 16-byte pieces of a row are permuted by
the row's number, and tiles of values are transposed, with tokens in the order in which a lane has
its weights. They have second numbers for fine tiles, which hold what the first ones left over: of
queries and keys in units of 2**-REST_BITS, of values in the same units as the first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from kvquant.kernels.cuda_prompt_attention import QUERIES
from kvquant.kernels.eight_bit_attention import REST_BITS, SMALLEST, TILE, rotate_heads
from kvquant.kernels.triton_prompt_pack_kernels import (
    _conclude,
    _measure,
    _pack_prompt_keys,
    _pack_prompt_queries,
)

# Tokens that `_measure` reads at a time, and how often; channels whose means `_conclude` rotates at
# a time, and parts that it reads together.
TOKENS, LOOPS, CHANNELS, TOGETHER = 64, 16, 32, 32


@dataclass(frozen=True)
class Keys:
    """The keys and values that a call or a part of it attends to, quantized.

    Attributes:
        counts: int32 `[batch_size, 3]`: queries, keys, and keys that come before the first query,
            which may be negative.
        keys: INT8 `[batch_size, num_kv_heads, tiles, 128 * head_dim]`, the first numbers and, for
            the CUDA kernel, the second ones.
        key_scales: fp32 `[batch_size, num_kv_heads, tiles]`.
        key_means: fp32 `[batch_size, num_kv_heads, head_dim]`.
        values: e4m3 as bytes, likewise; None where values stay in 16 bits.
        value_scales: fp32 `[batch_size, num_kv_heads, head_dim]`.
    """

    counts: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    key_scales: torch.Tensor
    key_means: torch.Tensor
    values: tuple[torch.Tensor, ...] | None
    value_scales: torch.Tensor


@dataclass(frozen=True)
class Queries:
    """Quantized queries.

    Attributes:
        queries: INT8 `[batch_size, num_heads, tiles, 64 * head_dim]`, the first numbers and, for
            the CUDA kernel, the second ones.
        scales: fp32 `[batch_size, num_heads, tiles, 64]`, with the factor of the scores, in units
            of log2.
        offsets: The same shape: what the means of the keys add to the scores; None: not asked for.
    """

    queries: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    offsets: torch.Tensor | None


@functools.lru_cache(maxsize=16)
def _signs(dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns the Hadamard matrix of ones and minus ones."""
    with torch.inference_mode(False):
        return (rotate_heads(torch.eye(dim)) * math.sqrt(dim)).round().to(device, dtype)


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
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]`, rotated, any strides of tokens;
            `head_dim` is a power of two.
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
    parts, tiles = -(-length // (TOKENS * LOOPS)), -(-length // TILE)
    facts = keys.new_empty((batch, heads, parts, 2, dim), dtype=torch.float32)
    _measure[(parts, heads, batch)](
        keys, values, table, counts, facts, *strides, columns is not None, dim, TOKENS, LOOPS,
    )  # fmt: skip
    signs = _signs(dim, keys.dtype, keys.device)
    means, rotated, largest, scales = facts.new_empty((4, batch, heads, dim)).unbind()
    _conclude[(heads, batch)](
        facts, counts, signs, means, rotated, largest, scales, parts, dim, CHANNELS, TOGETHER,
        math.sqrt(dim),
    )  # fmt: skip
    packed = keys.new_empty((1 + swizzled, batch, heads, tiles, TILE * dim), dtype=torch.int8)
    packed_values = torch.empty_like(packed, dtype=torch.uint8) if swizzled else None
    key_scales = facts.new_empty((batch, heads, tiles))
    written = packed if packed_values is None else packed_values.view(torch.float8_e4m3fn)
    _pack_prompt_keys[(tiles, heads, batch)](
        keys, values, table, counts, signs, rotated, largest, packed, written, key_scales,
        *strides, packed.stride(0), columns is not None, dim, TILE, SMALLEST, math.sqrt(dim),
        2**REST_BITS, swizzled, num_warps=8,
    )  # fmt: skip
    both = None if packed_values is None else packed_values.unbind()
    return Keys(counts, packed.unbind(), key_scales, means, both, scales)


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
    shape = (1 + swizzled, batch, heads, tiles, QUERIES * dim)
    packed = queries.new_empty(shape, dtype=torch.int8)
    scales = queries.new_empty((batch, heads, tiles, QUERIES), dtype=torch.float32)
    added = torch.empty_like(scales) if offsets else None
    signs = _signs(dim, queries.dtype, queries.device)
    _pack_prompt_queries[(tiles, heads, batch)](
        queries, table, keys.counts, keys.counts if order is None else order, signs,
        keys.key_means, packed, scales, scales if added is None else added,
        scaling * math.log2(math.e), *queries.stride()[:3], stride, packed.stride(0),
        columns is not None, order is not None, offsets, dim, heads // keys.key_means.shape[1],
        QUERIES, SMALLEST, math.sqrt(dim), 2**REST_BITS, swizzled,
    )  # fmt: skip
    return Queries(packed.unbind(), scales, added)
