"""Sets the outliers of a token aside whose heads are shared among processes."""

from __future__ import annotations

import torch

from kvquant.formats.head_share import HeadShare
from kvquant.kernels.pytorch_fused import order_keys, split_outliers

PIECE = 2**25  # elements that are sorted at a time

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def split_shared_outliers(x: torch.Tensor, per_side: int, share: HeadShare) -> Split:
    """Sets aside this process's part of the largest and smallest elements of each row, by rank.

    It finds what :func:`split_outliers` finds in rows of all heads, whose ties the lowest index of
    all wins.

    Args:
        x: fp16 or bf16 `[rows, n]`, the rows of this process's heads; `[rows, ranks * n]` have at
            most 65536 elements.
        per_side: Elements at each end of the rows of all heads; may be 0.
        share: Which heads these are.

    Returns:
        `(mask, low, high)`: bool `[rows, n]`, and fp32 `[rows, 1]` minimum and maximum of the rest
        of all heads.
    """
    total = x.shape[1] * share.ranks
    if 2 * per_side >= total and per_side:
        return split_outliers(x, per_side)
    if per_side == 0:
        mask, low, high = split_outliers(x, 0)
        ends = share.largest(torch.cat((high, -low), 1))
        return mask, -ends[:, 1:], ends[:, :1]
    pieces = x.split(max(1, PIECE // x.shape[1]))
    found = [_split(piece, per_side, share) for piece in pieces]
    mask, low, high = (torch.cat(part) for part in zip(*found, strict=True))
    return mask, low, high


def _split(x: torch.Tensor, per_side: int, share: HeadShare) -> Split:
    # Sort keys are unique in a row of all heads: what follows this process's elements there has
    # lower ones.
    behind = x.shape[1] * (share.ranks - 1 - share.rank)
    found = torch.stack((order_keys(x), order_keys(-x))) + behind
    chosen = found.topk(min(per_side + 1, x.shape[1]), dim=-1).values
    ends = share.gathered(chosen).topk(per_side + 1, dim=-1).values[..., per_side:]
    mask = (found > ends).any(0)
    high, low = _value(ends >> 16, x.dtype).float()
    return mask, -low, high


def _value(ordered: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the 16-bit floats of the upper halves of sort keys."""
    raw = torch.where(ordered < 0, -ordered - 0x8000, ordered)
    return raw.to(torch.int16).view(dtype)
