"""What is said where a model's numbers overflow: nothing is scored from NaN or infinity."""

from __future__ import annotations

from typing import Any

import torch

from kvquant.errors import NonFinite

# Types that hold the range of fp32; what overflows in them is wrong in itself.
WIDE = (torch.bfloat16, torch.float32, torch.float64)


def remedy(dtype: torch.dtype) -> str:
    """The advice to somebody whose model overflows in a type."""
    name = str(dtype).removeprefix("torch.")
    if dtype in WIDE:
        return (
            f"the weights are in {name}, not in fp16, where bf16 would help: look at the checkpoint"
        )
    return f"the model overflows in {name}: load it in bf16 (dtype=torch.bfloat16)"


def not_finite(qm: Any, what: str) -> NonFinite:
    """The error for a quantized model.

    Args:
        qm: A `QuantizedModel`.
        what: What is NaN or infinite, and where: "logits of step 3 of an answer".
    """
    scheme = qm.scheme
    bits = f"-{scheme.bits}" if hasattr(scheme, "bits") else ""
    return NonFinite(f"scheme {scheme.kind}{bits}: {what} are not finite: {remedy(qm.dtype)}")
