"""Causal attention of a prompt with 8-bit products, in PyTorch: what its kernels compute.

Scores are products of 8-bit queries and keys, weighted sums are products of E4M3 weights and values
(or of 16-bit ones). Three steps before the rounding change nothing but rounding errors: the mean of
the keys is taken out (Zhang et al., SageAttention, arXiv 2410.02367), queries and keys are rotated
by one Hadamard matrix (Ashkboos et al., QuaRot, arXiv 2404.00456), and each tile of keys has an
exponent of its own for the weights.

Most of a row's weight is on the first tokens and on those just before it, so most of its error
would come from there, too. The first tile of keys and those next to a row are *fine*: their scores
and values have about 16 bits. That is a small share of a long prompt's tiles. Weights stay in E4M3.

The exponents are for long prompts: weights that are rounded relative to the largest score so far
vanish beside one strong key. E4M3 ends at 2**-9, so a first token with half of a row's weight would
leave nothing of 2**18 others with the rest. The running output is therefore kept relative to the
tile that was added last, which costs a kernel nothing: it scales its output once per tile anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

TILE = 128  # keys whose scores share a scale, and whose weights share an exponent
NEAR_TILES = 1  # fine ones before the tile of a row's last key, which is fine itself
REST_BITS = 7  # that a kernel gives to what rounding leaves of a fine tile's queries and keys
WEIGHT_BITS = 8  # the largest weight of a tile is 2**8, below E4M3's largest number
# How far a tile's exponent may lie below the largest score so far (in powers of two), so that the
# running output, which is relative to it, stays far from fp32's largest number.
MAX_DROP = 40.0
SMALLEST = 1e-30  # rows, tiles or channels that are smaller count as zeros: 1 / x stays finite
LARGEST = {"int8": 127.0, "fp8": 448.0}


@dataclass(frozen=True)
class EightBitFormat:
    """Number formats of the two products of attention.

    Attributes:
        scores: Queries and keys in INT8 with int32 sums, or in E4M3 with fp32 sums.
        values: Weights and values in E4M3; or both in the 16-bit dtype of the values (fp16 for fp32
            values).
    """

    scores: Literal["int8", "fp8"] = "int8"
    values: Literal["fp8", "16-bit"] = "fp8"


class Codes(NamedTuple):
    """8-bit numbers and what they are to be multiplied by.

    Attributes:
        codes: int8 or float8_e4m3fn.
        scale: fp32, to be broadcast against the codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor


def _encode(x: torch.Tensor, largest: torch.Tensor, kind: Literal["int8", "fp8"]) -> Codes:
    """Rounds data to 8 bits, given its largest magnitudes, which are broadcast against it."""
    top = LARGEST[kind]
    inverse = torch.where(largest > SMALLEST, top / largest, torch.zeros_like(largest))
    scaled = (x * inverse).clamp(-top, top)
    codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return Codes(codes, largest / top)


def rotate_heads(x: torch.Tensor) -> torch.Tensor:
    """Rotates vectors of heads by Hadamard matrices, which spreads outlier channels.

    The matrix has the size of the largest power of two that divides the head dimension; of 80
    channels each 16 are rotated.

    Args:
        x: fp32 `[..., head_dim]`.

    Returns:
        The same shape.
    """
    dim = x.shape[-1]
    size = dim & -dim
    half = 1
    while half < size:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        half *= 2
    return x * (1.0 / math.sqrt(size))


def mean_key(keys: torch.Tensor) -> torch.Tensor:
    """Averages the keys of each sequence and head.

    Args:
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]`.

    Returns:
        fp32 `[batch_size, num_kv_heads, 1, head_dim]`.
    """
    return keys.float().mean(2, keepdim=True)


def quantize_queries(queries: torch.Tensor, fmt: EightBitFormat) -> Codes:
    """Rotates queries and rounds them to 8 bits, with one scale per token and head.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]` after RoPE.
        fmt: The number formats.

    Returns:
        Codes of the same shape, scales `[batch_size, num_heads, q_len, 1]`.
    """
    rotated = rotate_heads(queries.float())
    return _encode(rotated, rotated.abs().amax(-1, keepdim=True), fmt.scores)


def smooth_keys(keys: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """Takes the mean out of keys and rotates them.

    Any mean gives the same softmax, provided that all keys of a call share it: it adds the same
    number to all scores of a query.

    Args:
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]` after RoPE.
        mean: What is taken out, `[batch_size, num_kv_heads, 1, head_dim]`; None: :func:`mean_key`.

    Returns:
        fp32 of the same shape.
    """
    mean = mean_key(keys) if mean is None else mean
    # The mean is taken out before the rotation: the order in which rounding is least.
    return rotate_heads(keys.float() - mean)


def quantize_keys(
    keys: torch.Tensor, fmt: EightBitFormat, mean: torch.Tensor | None = None
) -> Codes:
    """Rounds keys to 8 bits, one scale per tile, after :func:`smooth_keys`.

    Args:
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]` after RoPE.
        fmt: The number formats.
        mean: What is taken out, `[batch_size, num_kv_heads, 1, head_dim]`; None: :func:`mean_key`.

    Returns:
        Codes of the same shape; scales `[batch_size, num_kv_heads, ceil(kv_len / TILE), 1]`.
    """
    rotated, length = smooth_keys(keys, mean), keys.shape[2]
    padded = torch.nn.functional.pad(rotated, (0, 0, 0, -length % TILE))
    tiles = padded.unflatten(2, (-1, TILE))
    codes, scale = _encode(tiles, tiles.abs().amax((-1, -2), keepdim=True), fmt.scores)
    return Codes(codes.flatten(2, 3)[:, :, :length], scale[..., 0])


def quantize_values(values: torch.Tensor) -> Codes:
    """Rounds values to E4M3, with one scale per sequence, head and channel.

    Their mean stays in: taking it out, exact as it would be, gives the first token of a prompt, to
    which many heads give most of their weight and whose values are nearly zero, large values and
    large errors with them.

    Args:
        values: `[batch_size, num_kv_heads, kv_len, head_dim]`.

    Returns:
        Codes of the same shape; scales `[batch_size, num_kv_heads, 1, head_dim]`.
    """
    wide = values.float()
    return _encode(wide, wide.abs().amax(2, keepdim=True), "fp8")


def _values(values: torch.Tensor, fmt: EightBitFormat) -> Codes:
    """Returns values as the second product takes them, and their scale."""
    if fmt.values == "fp8":
        return quantize_values(values)
    kind = torch.float16 if values.dtype == torch.float32 else values.dtype
    return Codes(values.to(kind), torch.ones_like(values[:, :, :1]).float())


def _weights(exponents: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Returns powers of two, rounded as the second product takes them, in fp32.

    Args:
        exponents: fp32, at most 0.
        kind: dtype of the values.
    """
    bits = WEIGHT_BITS if kind == torch.float8_e4m3fn else 0
    return torch.exp2(exponents + bits).to(kind).float()


def eight_bit_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    fmt: EightBitFormat | None = None,
) -> torch.Tensor:
    """Computes causal softmax attention with 8-bit products, tile by tile of keys.

    The queries are those of the last `q_len` of `kv_len` columns: the one at index `i` sees the
    keys up to column `kv_len - q_len + i`. Padding is left out before anything else, so that tiles
    begin at a sequence's first token; where its columns are, the host waits to be told. A kernel
    may treat more tiles as fine ones, and gives them 15 bits.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]` after RoPE.
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]` after RoPE; `num_heads` is a multiple
            of `num_kv_heads`.
        values: The same shape.
        scaling: Factor of the scores.
        valid: bool `[batch_size, kv_len]`, whether there is a token (padding lies anywhere); None:
            everywhere.
        fmt: The number formats; None: the default ones.

    Returns:
        `[batch_size, q_len, num_heads, head_dim]` in the dtype of the queries; zeros in padding.
    """
    fmt = EightBitFormat() if fmt is None else fmt
    if valid is None:
        return _attend(queries, keys, values, scaling, fmt)
    out = torch.zeros_like(queries).transpose(1, 2)
    own = valid[:, keys.shape[2] - queries.shape[2] :]
    for b, (tokens, asked) in enumerate(zip(valid, own, strict=True)):
        q, k, v = queries[b][:, asked], keys[b][:, tokens], values[b][:, tokens]
        if q.shape[1]:
            out[b, asked] = _attend(q[None], k[None], v[None], scaling, fmt)[0]
    return out


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    fmt: EightBitFormat,
) -> torch.Tensor:
    """Computes :func:`eight_bit_attention` of sequences without padding."""
    batch, heads, q_len, dim = queries.shape
    kv_heads, kv_len = keys.shape[1:3]
    offset = kv_len - q_len
    q, q_scale = quantize_queries(queries, fmt)
    # Scores in powers of two: a GPU's exponential is that of base two.
    scaling *= math.log2(math.e)
    q_scale = (q_scale * scaling).unflatten(1, (kv_heads, -1))
    # The integers are exact in fp32, and so are their sums: 127 * 127 * 256 < 2**24.
    q_wide = q.float().unflatten(1, (kv_heads, -1))
    q_fine = (rotate_heads(queries.float()) * scaling).unflatten(1, (kv_heads, -1))
    k, k_scale = quantize_keys(keys, fmt)
    k_fine = smooth_keys(keys)
    v, v_scale = _values(values, fmt)
    v_wide, v_fine = v.float() * v_scale, values.float()
    out = torch.zeros_like(q_wide)
    total = out.new_zeros((*out.shape[:-1], 1))
    highest = torch.full_like(total, -math.inf)  # of all tiles so far
    base = torch.zeros_like(total)  # exponent that `out` and `total` are relative to
    columns = torch.arange(kv_len, device=queries.device)
    for start in range(0, kv_len, TILE):
        first = max(0, start - offset)  # queries before it see none of the tile
        tile = slice(start, min(start + TILE, kv_len))
        # Rows before `last` are next to the tile, which is a fine one for them.
        last = q_len if start == 0 else max(first, start + (1 + NEAR_TILES) * TILE - offset)
        near, far = slice(first, last), slice(last, None)
        fine = q_fine[..., near, :] @ k_fine[:, :, None, tile].mT
        coarse = q_wide[..., far, :] @ k[:, :, None, tile].float().mT
        coarse *= q_scale[..., far, :] * k_scale[:, :, None, None, start // TILE]
        scores = torch.cat((fine, coarse), -2)
        seen = columns[tile] <= columns[offset + first :, None]
        scores = scores.masked_fill(~seen, -math.inf)
        here = scores.amax(-1, keepdim=True)
        high = torch.maximum(highest[..., first:, :], here)
        new = torch.maximum(here, high - MAX_DROP)
        weights = _weights(scores - new, v.dtype)
        # At most 2**MAX_DROP, or any number below 1. Before the first tile nothing is kept.
        old = torch.exp2(base[..., first:, :] - new) if start else torch.zeros_like(new)
        count = fine.shape[-2]
        near_sum = weights[..., :count, :] @ v_fine[:, :, None, tile]
        far_sum = weights[..., count:, :] @ v_wide[:, :, None, tile]
        added = torch.cat((near_sum, far_sum), -2)
        out[..., first:, :] = out[..., first:, :] * old + added
        total[..., first:, :] = total[..., first:, :] * old + weights.sum(-1, keepdim=True)
        base[..., first:, :], highest[..., first:, :] = new, high
    return (out / total).reshape(batch, heads, q_len, dim).transpose(1, 2).to(queries.dtype)
