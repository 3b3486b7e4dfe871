"""Thresholds that give exact codes by comparisons of 16-bit numbers.

With a channel's zero and scale fixed, the code of an element grows with the element. So a code is
the number of *thresholds* at or below the element, where a threshold is the smallest 16-bit number
that the fp32 arithmetic `(x - zero) * inverse` puts above a midpoint. A kernel then needs no
arithmetic, and compares two elements at a time.
"""

from __future__ import annotations

import torch


def largest(dtype: torch.dtype) -> int:
    """Returns the largest finite number of a 16-bit type, as an integer in the floats' order."""
    return 0x7BFF if dtype is torch.float16 else 0x7F7F


def from_order(order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the 16-bit floats of integers in their order (0 is zero, -1 the next below)."""
    raw = torch.where(order < 0, (-order) | 0x8000, order)
    return torch.where(raw >= 0x8000, raw - 0x10000, raw).to(torch.int16).view(dtype)


def _first(
    zero: torch.Tensor, inverse: torch.Tensor, bound: float | torch.Tensor, dtype: torch.dtype,
    *, strict: bool,
) -> torch.Tensor:  # fmt: skip
    """Returns the order of the smallest number above (or not below) a bound; infinity if none."""
    most = largest(dtype)
    low = torch.full_like(zero, -most, dtype=torch.int32)
    high = torch.full_like(low, most + 1)
    for _ in range(16):
        middle = (low + high) >> 1
        normalized = (from_order(middle, dtype).float() - zero) * inverse
        found = normalized > bound if strict else ~(normalized < bound)
        high = torch.where(found, middle, high)
        low = torch.where(found, low, middle + 1).minimum(high)
    return low


def key_thresholds(
    zero: torch.Tensor,
    inverse: torch.Tensor,
    midpoints: torch.Tensor,
    dtype: torch.dtype,
    *,
    outliers: bool,
) -> torch.Tensor:
    """Returns the thresholds of static channels.

    Args:
        zero: fp32 `[num_heads, head_dim]`.
        inverse: fp32 `[num_heads, head_dim]`, 1 / scale, or infinity.
        midpoints: fp32 `[edges]`, sorted.
        dtype: Of the elements.
        outliers: Add the bounds of what is kept exactly.

    Returns:
        `[num_heads, head_dim, edges (+ 2)]` of `dtype`, infinity where no element reaches it; then
        the largest number that is an outlier below the range and the smallest one above it.
    """
    edges = [_first(zero, inverse, m, dtype, strict=True) for m in midpoints]
    if outliers:
        edges.append(_first(zero, inverse, -1.0, dtype, strict=False) - 1)
        edges.append(_first(zero, inverse, 1.0, dtype, strict=True))
    return from_order(torch.stack(edges, -1), dtype)


def key_table(thresholds: torch.Tensor) -> torch.Tensor:
    """Puts thresholds into the order in which `cuda/pack.cu` loads them.

    Args:
        thresholds: 16-bit `[num_heads, head_dim, n]`.

    Returns:
        `[num_heads, 8 lanes, vectors, head_dim / 16, 4, 2]`: vectors of four thresholds, each of
        two neighbouring channels.
    """
    heads, dim, n = thresholds.shape
    vectors = -(-n // 4)
    padded = thresholds.new_zeros((heads, dim, vectors * 4))
    padded[..., :n] = thresholds
    split = padded.view(heads, 8, dim // 16, 2, vectors, 4)
    return split.permute(0, 1, 4, 2, 5, 3).contiguous()
