"""Outputs through which no gradient flows, and which say so instead of giving wrong ones."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.errors import UserError


class _Refused(torch.autograd.Function):
    """The identity, with a backward pass that raises."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise UserError(
            "gradients: tokens that a quantized cache holds have none, so those of this call would "
            "be wrong; train with a cache of transformers, or give the whole sequence in the first "
            "call of a cache under protocol A"
        )


def without_gradient(output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """The output, which refuses a backward pass that would reach the inputs.

    Args:
        output: Computed from the inputs and from tensors that were detached.
        inputs: What a gradient would be expected for.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        refused: torch.Tensor = _Refused.apply(output.detach(), *inputs)
        return refused
    return output
