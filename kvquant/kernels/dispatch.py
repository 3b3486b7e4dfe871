"""Which implementation runs: the only place that decides.

`KVQUANT_KERNELS=pytorch` turns the GPU kernels off; `KVQUANT_KERNELS=triton` demands them, which on
a CPU works under Triton's interpreter only (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import functools
import os

import torch

from kvquant.errors import UserError


@functools.cache
def _triton_is_there() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def use_triton(x: torch.Tensor) -> bool:
    """Whether Triton kernels run on this tensor.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the three.
    """
    wish = os.environ.get("KVQUANT_KERNELS", "auto")
    if wish not in ("auto", "pytorch", "triton"):
        raise UserError(f"KVQUANT_KERNELS: '{wish}' is none of auto, pytorch, triton")
    if wish == "pytorch":
        return False
    return (x.is_cuda or wish == "triton") and _triton_is_there()
