"""Outputs that refuse a backward pass instead of giving wrong gradients."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.errors import UserError

OF_CACHES = (
    "gradients: tokens in a quantized cache have none, so those of this call would be wrong: train "
    "with a cache of transformers, or give the whole sequence in the first call of a cache under "
    "protocol A"
)


class _Refused(torch.autograd.Function):
    """Passes a tensor through and raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, why: str, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.why = why
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise UserError(ctx.why)


def without_gradient(
    output: torch.Tensor, *inputs: torch.Tensor, why: str = OF_CACHES
) -> torch.Tensor:
    """Returns `output` such that a backward pass raises if it would reach the inputs.

    Args:
        output: Computed from the inputs and from detached tensors.
        inputs: Tensors for which a gradient could be expected.
        why: The message of the error.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        refused: torch.Tensor = _Refused.apply(why, output.detach(), *inputs)
        return refused
    return output
