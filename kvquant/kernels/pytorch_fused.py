"""The fused PyTorch path: all heads and tokens of a layer in a few passes, on any device."""

from __future__ import annotations

import torch

MAX_COUNTED = 16  # levels up to which midpoints are counted


def midpoints(levels: torch.Tensor) -> torch.Tensor:
    """Returns where codes change: fp32 `[2**bits - 1]` for levels fp32 `[2**bits]`."""
    return (levels[:-1] + levels[1:]) * 0.5


def encode(normalized: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Returns the codes of the nearest levels.

    Counting the midpoints below an element costs `2**bits - 1` vectorised compares and no table of
    distances; for at most 16 levels that is two to five times faster on a CPU than a binary search,
    which is taken for more. On an exact midpoint the lower level is taken. NaN gets the first level
    where midpoints are counted, and the last one where they are searched.

    Args:
        normalized: fp32, any shape.
        levels: fp32 `[2**bits]`, sorted.

    Returns:
        uint8 codes of the same shape.
    """
    edges = midpoints(levels)
    if levels.numel() > MAX_COUNTED:
        return torch.bucketize(normalized.contiguous(), edges, out_int32=True).to(torch.uint8)
    codes = (normalized > edges[0]).view(torch.uint8)
    for i in range(1, edges.numel()):
        codes.add_((normalized > edges[i]).view(torch.uint8))
    return codes


def decode(codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Looks the levels of codes up: uint8 of any shape to fp32 of the same shape."""
    return torch.index_select(levels, 0, codes.reshape(-1).int()).view(codes.shape)


def inverse_range(scale: torch.Tensor) -> torch.Tensor:
    """Returns 1 / scale, or 0 for an empty range, so that constant data gets its zero-point."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)


def channel_inverse(scale: torch.Tensor) -> torch.Tensor:
    """Returns 1 / scale of static channels, infinity for an empty range.

    Of a channel that was constant in calibration, `(x - zero) * inverse` is then infinite for all
    that differs from the constant, which makes it an outlier, and NaN for the constant itself,
    which no comparison takes for one; its code is 0 and stands for `level * 0 + zero`.
    """
    return 1.0 / (scale + 0.0)  # of -0 as well


def order_keys(x: torch.Tensor) -> torch.Tensor:
    """Returns distinct int32 sort keys along the last dimension of 16-bit floats.

    The upper half orders the values as the floats do (-0 counts as equal to 0), the lower half
    breaks ties in favour of the lowest index, so that top-k picks the same on every device.

    Args:
        x: fp16 or bf16 `[..., n]`, n at most 65536.

    Returns:
        int32 `[..., n]`, larger for larger values.
    """
    raw = x.contiguous().view(torch.int16).to(torch.int32)
    ordered = torch.where(raw < 0, -(raw & 0x7FFF), raw)
    n = x.shape[-1]
    tie = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=x.device)
    return (ordered << 16) + tie


def split_outliers(
    x: torch.Tensor, per_side: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sets aside the `per_side` largest and smallest elements of each row, by rank.

    Args:
        x: fp16 or bf16 `[rows, n]` with `2 * per_side < n`.
        per_side: Elements at each end; may be 0.

    Returns:
        `(mask, low, high)`: bool `[rows, n]`, and fp32 `[rows, 1]` minimum and maximum of the rest.
    """
    rows, n = x.shape
    if per_side == 0:
        empty = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        return empty, x.amin(-1, keepdim=True).float(), x.amax(-1, keepdim=True).float()
    if 2 * per_side >= n:
        zero = torch.zeros((rows, 1), dtype=torch.float32, device=x.device)
        return torch.ones(x.shape, dtype=torch.bool, device=x.device), zero, zero
    high = order_keys(x).topk(per_side + 1, dim=-1).indices
    low = order_keys(-x).topk(per_side + 1, dim=-1).indices
    mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    mask.scatter_(-1, high[:, :per_side], True)
    mask.scatter_(-1, low[:, :per_side], True)
    # By rank the two ends never meet (2 * per_side < n), so the next ones are the inliers' ends.
    top = x.gather(-1, high[:, per_side:]).float()
    bottom = x.gather(-1, low[:, per_side:]).float()
    return mask, bottom, top
