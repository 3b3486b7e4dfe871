"""Which implementation runs: the only place that decides.

`KVQUANT_KERNELS=pytorch` turns the GPU kernels off; `KVQUANT_KERNELS=triton` demands those written
in Triton and no others, which on a CPU works under Triton's interpreter only
(`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import functools
import os
import warnings

import torch

from kvquant.errors import UserError
from kvquant.kernels import cuda_decode, cuda_pack
from kvquant.kernels.cuda_build import KernelUnavailable
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.cuda_pack import PackShape


@functools.cache
def _triton_is_there() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _wish() -> str:
    wish = os.environ.get("KVQUANT_KERNELS", "auto")
    if wish not in ("auto", "pytorch", "triton"):
        raise UserError(f"KVQUANT_KERNELS: '{wish}' is none of auto, pytorch, triton")
    return wish


@functools.cache
def _cuda_works(shape: DecodeShape | PackShape, device: int) -> bool:
    """Whether a kernel compiles and loads; says once why not."""
    try:
        if isinstance(shape, DecodeShape):
            cuda_decode.functions(shape, device)
        else:
            cuda_pack.functions(shape, device)
    except KernelUnavailable as reason:
        name = "decode" if isinstance(shape, DecodeShape) else "packing"
        warnings.warn(f"no CUDA {name} kernel, another instead: {reason}", stacklevel=4)
        return False
    return True


def _use_cuda(shape: DecodeShape | PackShape, device: torch.device) -> bool:
    if _wish() != "auto" or device.type != "cuda" or shape.refusal() is not None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_works(shape, index)


def use_cuda(shape: DecodeShape, device: torch.device) -> bool:
    """Whether the CUDA decode kernel reads a cache of this shape.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the three.
    """
    return _use_cuda(shape, device)


def use_cuda_pack(shape: PackShape, device: torch.device) -> bool:
    """Whether the CUDA kernels pack blocks of this shape; they come before Triton's.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the three.
    """
    return _use_cuda(shape, device)


def use_triton(x: torch.Tensor) -> bool:
    """Whether Triton kernels run on this tensor.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the three.
    """
    wish = _wish()
    if wish == "pytorch":
        return False
    return (x.is_cuda or wish == "triton") and _triton_is_there()


def use_triton_attention(shape: DecodeShape, queries: torch.Tensor) -> bool:
    """Whether the Triton kernels attend to a cache of this shape.

    fp32 queries keep fp32 arithmetic in them, which tensor cores do not have: only on demand.

    Args:
        shape: Of the cache; its `head_dim` must be a power of two from 32 to 256.
        queries: Of the call.
    """
    if shape.head_dim not in (32, 64, 128, 256) or not use_triton(queries):
        return False
    return queries.dtype in (torch.float16, torch.bfloat16) or _wish() == "triton"
