"""Checks of the blocks that quantizers pack, and the room that they give key outliers."""

from __future__ import annotations

import math

import torch

from kvquant.errors import NonFiniteTokens


def check_block(x: torch.Tensor, name: str) -> None:
    """Refuses blocks of another dtype than 16 bits, and on a CPU those that are not finite.

    On a GPU the host would wait for the answer; callers ask :func:`not_finite` there instead.

    Raises:
        TypeError: The dtype is another one.
        NonFiniteTokens: The blocks hold NaN or Inf.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: expected fp16 or bf16 blocks, got {x.dtype}")
    if not x.is_cuda and not bool(torch.isfinite(x).all()):
        raise NonFiniteTokens(name)


def not_finite(*blocks: torch.Tensor) -> torch.Tensor:
    """Returns an int32 tensor `[1]` that is 1 if any block holds NaN or Inf, without a sync."""
    found = torch.stack([torch.isfinite(x).all() for x in blocks])
    return (~found.all()).int().view(1)


SPARE_SLOTS = 1024  # for key outliers of small inputs, whose share varies more


def outlier_slots(fraction: float, elements: int, room: float) -> int:
    """Returns how many key outliers a GPU makes room for: 1.5 times the calibrated number.

    The host never waits for the true number. `SPARE_SLOTS` more cover small inputs.

    Args:
        fraction: Calibrated share of outliers.
        elements: Number of key elements.
        room: Factor by which the room is widened.
    """
    if fraction == 0:
        return 0
    return min(math.ceil(room * (1.5 * fraction * elements + SPARE_SLOTS)), elements)
