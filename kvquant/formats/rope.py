"""Rotary position embedding in the half-split form of Llama."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Maps positions `[batch_size, seq_len]` to cosine and sine, `[batch_size, seq_len, head_dim]` each.
Rope = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of channels by the angles of their positions.

    Args:
        x: `[batch_size, num_heads, seq_len, head_dim]`.
        cos: `[batch_size or 1, seq_len, head_dim]`, cosine of the angle per position and channel.
        sin: The sine, of the same shape.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
