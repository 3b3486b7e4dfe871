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


def without_padding(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Returns fp32 keys or values with zeros in place of padding, which may hold anything.

    Args:
        x: `[batch_size, num_kv_heads, kv_len, head_dim]`.
        valid: bool `[batch_size, kv_len]`, whether there is a token; None: everywhere.
    """
    wide = x.float()
    return wide if valid is None else wide.masked_fill(~valid[:, None, :, None], 0.0)


def mean_key(keys: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Averages the keys of each sequence and head over its tokens.

    Args:
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]`.
        valid: bool `[batch_size, kv_len]`, whether there is a token; None: everywhere.

    Returns:
        fp32 `[batch_size, num_kv_heads, 1, head_dim]`, zeros for a sequence without tokens.
    """
    total = without_padding(keys, valid).sum(2, keepdim=True)
    if valid is None:
        return total / max(1, keys.shape[2])
    return total / valid.sum(-1).clamp(min=1)[:, None, None, None]


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


def smooth_keys(
    keys: torch.Tensor, valid: torch.Tensor | None = None, mean: torch.Tensor | None = None
) -> torch.Tensor:
    """Takes the mean out of keys and rotates them.

    Any mean gives the same softmax, provided that all keys of a call share it: it adds the same
    number to all scores of a query.

    Args:
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]` after RoPE.
        valid: bool `[batch_size, kv_len]`, whether there is a token; None: everywhere.
        mean: What is taken out, `[batch_size, num_kv_heads, 1, head_dim]`; None: :func:`mean_key`.

    Returns:
        fp32 of the same shape, 0 in place of padding.
    """
    mean = mean_key(keys, valid) if mean is None else mean
    # The mean is taken out before the rotation: the order in which rounding is least.
    return without_padding(rotate_heads(without_padding(keys, valid) - mean), valid)


def quantize_keys(
    keys: torch.Tensor,
    fmt: EightBitFormat,
    valid: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
) -> Codes:
    """Rounds keys to 8 bits, one scale per tile, after :func:`smooth_keys`.

    Args:
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]` after RoPE.
        fmt: The number formats.
        valid: bool `[batch_size, kv_len]`, whether there is a token; None: everywhere.
        mean: What is taken out, `[batch_size, num_kv_heads, 1, head_dim]`; None: :func:`mean_key`.

    Returns:
        Codes of the same shape, 0 in place of padding; scales
        `[batch_size, num_kv_heads, ceil(kv_len / TILE), 1]`.
    """
    rotated, length = smooth_keys(keys, valid, mean), keys.shape[2]
    padded = torch.nn.functional.pad(rotated, (0, 0, 0, -length % TILE))
    tiles = padded.unflatten(2, (-1, TILE))
    codes, scale = _encode(tiles, tiles.abs().amax((-1, -2), keepdim=True), fmt.scores)
    return Codes(codes.flatten(2, 3)[:, :, :length], scale[..., 0])


def quantize_values(values: torch.Tensor, valid: torch.Tensor | None = None) -> Codes:
    """Rounds values to E4M3, with one scale per sequence, head and channel.

    Their mean stays in: taking it out, exact as it would be, gives the first token of a prompt, to
    which many heads give most of their weight and whose values are nearly zero, large values and
    large errors with them.

    Args:
        values: `[batch_size, num_kv_heads, kv_len, head_dim]`.
        valid: bool `[batch_size, kv_len]`, whether there is a token; None: everywhere.

    Returns:
        Codes of the same shape, 0 in place of padding; scales
        `[batch_size, num_kv_heads, 1, head_dim]`.
    """
    wide = without_padding(values, valid)
    return _encode(wide, wide.abs().amax(2, keepdim=True), "fp8")


def _values(values: torch.Tensor, valid: torch.Tensor | None, fmt: EightBitFormat) -> Codes:
    """Returns values as the second product takes them, without padding, and their scale."""
    if fmt.values == "fp8":
        return quantize_values(values, valid)
    kind = torch.float16 if values.dtype == torch.float32 else values.dtype
    return Codes(without_padding(values, valid).to(kind), torch.ones_like(values[:, :, :1]).float())


def _weights(exponents: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Returns powers of two, rounded as the second product takes them, in fp32.

    Args:
        exponents: fp32, at most 0.
        kind: dtype of the values.
    """
    bits = WEIGHT_BITS if kind == torch.float8_e4m3fn else 0
    return torch.exp2(exponents + bits).to(kind).float()


def _first_tiles(valid: torch.Tensor) -> torch.Tensor:
    """Returns which tiles have some of a sequence's first `TILE` tokens, behind its padding.

    Args:
        valid: bool `[batch_size, kv_len]`, whether there is a token.

    Returns:
        bool `[batch_size, ceil(kv_len / TILE)]`.
    """
    first = valid & (valid.cumsum(-1) <= TILE)
    padded = torch.nn.functional.pad(first, (0, -valid.shape[-1] % TILE))
    return padded.unflatten(-1, (-1, TILE)).any(-1)


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

    The queries are the last `q_len` of the `kv_len` tokens: query `i` sees valid keys up to column
    `kv_len - q_len + i`. Nothing in padding reaches the output of a token. A kernel may treat more
    tiles as fine ones, and gives them 15 bits. Kernels leave padding out, so that their tiles begin
    at a sequence's first token; here they begin at column 0, and those with one of the first `TILE`
    tokens are fine.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]` after RoPE.
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]` after RoPE; `num_heads` is a multiple
            of `num_kv_heads`.
        values: The same shape.
        scaling: Factor of the scores.
        valid: bool `[batch_size, kv_len]`, whether there is a token (padding lies on either side);
            None: everywhere.
        fmt: The number formats; None: the default ones.

    Returns:
        `[batch_size, q_len, num_heads, head_dim]` in the dtype of the queries; zeros for queries
        that see nothing.
    """
    fmt = EightBitFormat() if fmt is None else fmt
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
    k, k_scale = quantize_keys(keys, fmt, valid)
    k_fine = smooth_keys(keys, valid)
    v, v_scale = _values(values, valid, fmt)
    v_wide, v_fine = v.float() * v_scale, without_padding(values, valid)
    early = None if valid is None else _first_tiles(valid)
    out = torch.zeros_like(q_wide)
    rows = out.shape[:-1]
    total = out.new_zeros((*rows, 1))
    highest = out.new_full((*rows, 1), -math.inf)  # of all tiles so far
    base = torch.zeros_like(total)  # exponent that `out` and `total` are relative to
    columns = torch.arange(kv_len, device=queries.device)
    for start in range(0, kv_len, TILE):
        first = max(0, start - offset)  # queries before it see none of the tile
        if first >= q_len:
            break
        tile = slice(start, min(start + TILE, kv_len))
        fine = start + (1 + NEAR_TILES) * TILE - offset  # for rows before it
        fine = q_len if start == 0 and early is None else max(first, fine)
        near, far = slice(first, fine), slice(fine, None)
        exact = q_fine[..., near, :] @ k_fine[:, :, None, tile].mT
        far_q, far_k = q_wide[..., far, :], k[:, :, None, tile].float()
        far_scale = q_scale[..., far, :] * k_scale[:, :, None, None, start // TILE]
        far_v = v_wide[:, :, None, tile]
        if early is not None:  # sequences whose first tokens are here
            these = early[:, start // TILE, None, None, None, None]
            far_q = torch.where(these, q_fine[..., far, :], far_q)
            far_k = torch.where(these, k_fine[:, :, None, tile], far_k)
            far_scale = torch.where(these, torch.ones_like(far_scale), far_scale)
            far_v = torch.where(these, v_fine[:, :, None, tile], far_v)
        coarse = far_q @ far_k.mT * far_scale
        scores = torch.cat((exact, coarse), -2)
        seen = columns[tile] <= columns[offset + first :, None]
        if valid is not None:
            seen = seen & valid[:, None, None, None, tile]
        scores = scores.masked_fill(~seen, -math.inf)
        here = scores.amax(-1, keepdim=True)
        high = torch.maximum(highest[..., first:, :], here)
        new = torch.maximum(here, high - MAX_DROP)
        new = torch.where(new == -math.inf, torch.zeros_like(new), new)  # nothing seen so far
        weights = _weights(scores - new, v.dtype)
        # At most 2**MAX_DROP, or any number below 1; before the first key there is nothing to keep.
        old = torch.exp2(base[..., first:, :] - new)
        old = torch.where(highest[..., first:, :] == -math.inf, torch.zeros_like(old), old)
        count = exact.shape[-2]
        near_sum = weights[..., :count, :] @ v_fine[:, :, None, tile]
        far_sum = weights[..., count:, :] @ far_v
        added = torch.cat((near_sum, far_sum), -2)
        out[..., first:, :] = out[..., first:, :] * old + added
        total[..., first:, :] = total[..., first:, :] * old + weights.sum(-1, keepdim=True)
        base[..., first:, :], highest[..., first:, :] = new, high
    out = out / torch.where(total == 0, torch.ones_like(total), total)
    return out.reshape(batch, heads, q_len, dim).transpose(1, 2).to(queries.dtype)
