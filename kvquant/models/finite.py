"""The error for a model whose numbers overflow, as nothing is scored from NaN or infinity."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.errors import NonFinite

# dtypes with the range of fp32, in which only wrong weights overflow.
WIDE = (torch.bfloat16, torch.float32, torch.float64)


def remedy(dtype: torch.dtype) -> str:
    """Returns the advice for a model that overflows in a dtype."""
    name = str(dtype).removeprefix("torch.")
    if dtype in WIDE:
        return (
            f"the weights are in {name}, not in fp16, where bf16 would help: look at the checkpoint"
        )
    return (
        f"the model overflows in {name}: load it in bf16 (dtype=torch.bfloat16, in a study "
        "`dtype: bfloat16` of the model)"
    )


def not_finite(qm: Any, what: str) -> NonFinite:
    """Returns the error for numbers of a quantized model that are NaN or infinite.

    Args:
        qm: A `QuantizedModel`.
        what: The numbers and their place, such as "logits of step 3 of an answer".
    """
    scheme = qm.scheme
    bits = f"-{scheme.bits}" if hasattr(scheme, "bits") else ""
    return NonFinite(f"scheme {scheme.kind}{bits}: {what} are not finite: {remedy(qm.dtype)}")
