"""Rotary position embedding as Llama computes it."""

from __future__ import annotations

import torch


def rope(
    positions: torch.Tensor, dim: int, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[*positions.shape, dim]` in fp32, computed in float64.

    Args:
        positions: Of tokens.
        dim: Elements per head.
        factor: Of both, as scaled variants of RoPE have it.
    """
    inverse = 10000.0 ** (-torch.arange(0, dim, 2, device=positions.device).double() / dim)
    angles = positions[..., None].double() * inverse
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys `[..., dim]` rotated by tables of :func:`rope`."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)
