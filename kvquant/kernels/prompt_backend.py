"""Decides which backend runs attention with 8-bit products.

The environment's wishes and the device's reasons are those of :mod:`kvquant.kernels.backends`,
which decides for operations on a cache.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch

from kvquant.kernels import cuda_prompt_attention
from kvquant.kernels.backends import (
    Backend,
    DeviceFacts,
    Selection,
    device_facts,
    refusals,
    wish,
)
from kvquant.kernels.cuda_build import KernelUnavailable
from kvquant.kernels.cuda_prompt_attention import PromptShape
from kvquant.kernels.limits import HALF

TRITON_HEAD_DIMS = (64, 128, 256)
BACKENDS: tuple[Backend, ...] = ("cuda", "triton", "pytorch")


def select_prompt(head_dim: int, dtype: torch.dtype, device: torch.device) -> Selection:
    """Decides who attends; a CUDA kernel is compiled and loaded for that.

    Args:
        head_dim: Channels per head.
        dtype: Of queries, keys and values.
        device: Where they are.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the three.
    """
    return decide_prompt(head_dim, dtype, device_facts(device), wish())


@functools.lru_cache(maxsize=64)
def decide_prompt(
    head_dim: int, dtype: torch.dtype, facts: DeviceFacts, wished: str, *, load: bool = True
) -> Selection:
    """Returns the decision as a function of all that it depends on; see :func:`select_prompt`.

    Args:
        head_dim: Channels per head.
        dtype: Of queries, keys and values.
        facts: About the device.
        wished: Value of `KVQUANT_KERNELS`.
        load: Whether a CUDA kernel must also compile and load.
    """
    refused: list[tuple[Backend, tuple[str, ...]]] = []
    for backend in BACKENDS:
        reasons = [
            *refusals(backend, facts, wished),
            *_shape_refusals(backend, head_dim, dtype, facts, wished),
        ]
        if load and backend == "cuda" and not reasons:
            problem = _load_problem(PromptShape(head_dim, dtype is torch.bfloat16), facts.index)
            if problem is not None:
                reasons.append(
                    f"kernel: it does not compile or load ({problem.splitlines()[0]}); report "
                    "this, or set KVQUANT_KERNELS=triton"
                )
        if not reasons:
            return Selection("prompt", backend, tuple(refused))
        refused.append((backend, tuple(reasons)))
    return Selection("prompt", None, tuple(refused))


def _shape_refusals(
    backend: Backend, head_dim: int, dtype: torch.dtype, facts: DeviceFacts, wished: str
) -> Iterator[str]:
    """Yields the reasons of the shape, and of the GPU's generation, against a backend."""
    if backend == "pytorch":
        return
    known = cuda_prompt_attention.HEAD_DIMS if backend == "cuda" else TRITON_HEAD_DIMS
    if head_dim not in known:
        dims = ", ".join(map(str, known))
        yield f"head_dim: {head_dim} is none of {dims}; use a model with one of these"
    if dtype not in HALF and (backend == "cuda" or wished != "triton"):
        name = str(dtype).removeprefix("torch.")
        yield f"dtype: kernels read float16 and bfloat16, not {name}; load the model in one of them"
    if backend == "cuda" and facts.capability != cuda_prompt_attention.CAPABILITY:
        found, needed = (
            ".".join(map(str, c)) for c in (facts.capability, cuda_prompt_attention.CAPABILITY)
        )
        yield (
            f"device: compute capability {found} is not {needed}, whose instructions the kernel "
            "uses; use an H100 or an H200"
        )


@functools.cache
def _load_problem(shape: PromptShape, index: int) -> str | None:
    """Why the CUDA kernel does not compile or load, or None; a failure is warned of, once."""
    try:
        cuda_prompt_attention.function(shape, index)
    except KernelUnavailable as problem:
        warnings.warn(
            f"no CUDA kernel of 8-bit attention, another backend instead: {problem}", stacklevel=2
        )
        return str(problem) or type(problem).__name__
    return None
