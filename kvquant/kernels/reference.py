"""The specification: plain loops over elements, with which the tests compare every backend.

Nothing outside the tests imports this module.
"""

from __future__ import annotations

import torch


def pack_bits(codes: list[int], bits: int) -> list[int]:
    """Packs one block's codes one element at a time (layout of :mod:`kvquant.formats.packing`)."""
    few = {1: [1], 2: [2], 3: [2, 1], 4: [4]}
    planes = {**few, 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    out: list[int] = []
    shift = 0
    for width in planes:
        per_byte = 8 // width
        lane = len(codes) // per_byte
        plane = [0] * lane
        for i, code in enumerate(codes):
            field = (code >> shift) & ((1 << width) - 1)
            plane[i % lane] |= field << (width * (i // lane))
        out += plane
        shift += width
    return out


def nearest(value: float, levels: list[float]) -> int:
    """Returns the index of the nearest level; on a tie the lower one (fp32 midpoints decide)."""
    table = torch.tensor(levels, dtype=torch.float32)
    code = 0
    for i in range(len(levels) - 1):
        if value > ((table[i] + table[i + 1]) * 0.5).item():
            code = i + 1
    return code


def _dequantize(code: int, levels: torch.Tensor, zero: float, scale: float) -> float:
    step = levels[code] * torch.tensor(scale, dtype=torch.float32)
    return float(step + torch.tensor(zero, dtype=torch.float32))


def quantize_keys(
    x: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor, outliers: bool
) -> torch.Tensor:
    """Quantizes keys per channel with static ranges, and dequantizes them.

    Args:
        x: `[tokens, channels]`, 16-bit.
        zero: fp32 `[channels]`.
        scale: fp32 `[channels]`, half the range.
        levels: fp32 `[2**bits]`, sorted.
        outliers: Whether elements outside the range are kept exactly.

    Returns:
        fp32 `[tokens, channels]`.
    """
    out = torch.empty(x.shape, dtype=torch.float32)
    for t in range(x.shape[0]):
        for c in range(x.shape[1]):
            away = x[t, c].float() - zero[c]
            # A channel that was constant: its value has code 0, all else is outside its range.
            normalized = torch.tensor(0.0) if away == 0 else away / scale[c]
            if scale[c] > 0:
                normalized = away * (1.0 / scale[c])
            if outliers and abs(float(normalized)) > 1.0:
                out[t, c] = x[t, c].float()
            else:
                code = nearest(float(normalized), levels.tolist())
                out[t, c] = _dequantize(code, levels, float(zero[c]), float(scale[c]))
    return out


def quantize_values(x: torch.Tensor, levels: torch.Tensor, per_side: int) -> torch.Tensor:
    """Quantizes values per token with online ranges, and dequantizes them.

    The `per_side` largest and smallest elements of a token are set aside by rank (ties: the lowest
    channel first) and kept exactly; the rest sets the range, rounded to the input's 16-bit type.

    Args:
        x: `[tokens, channels]`, 16-bit.
        levels: fp32 `[2**bits]`, sorted.
        per_side: Outliers at each end of a token.

    Returns:
        fp32 `[tokens, channels]`.
    """
    tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=torch.float32)
    for t in range(tokens):
        row = [float(v) for v in x[t]]
        high = sorted(range(channels), key=lambda c: (-row[c], c))[:per_side]
        low = sorted(range(channels), key=lambda c: (row[c], c))[:per_side]
        aside = set(high) | set(low)
        inliers = [row[c] for c in range(channels) if c not in aside] or [0.0]
        top = torch.tensor(max(inliers), dtype=torch.float32)
        bottom = torch.tensor(min(inliers), dtype=torch.float32)
        zero = ((top + bottom) * 0.5).to(x.dtype).float()
        scale = ((top - bottom) * 0.5).to(x.dtype).float()
        inverse = torch.tensor(0.0) if scale == 0 else 1.0 / scale
        for c in range(channels):
            if c in aside:
                out[t, c] = row[c]
            else:
                normalized = (torch.tensor(row[c], dtype=torch.float32) - zero) * inverse
                code = nearest(float(normalized), levels.tolist())
                out[t, c] = _dequantize(code, levels, float(zero), float(scale))
    return out
