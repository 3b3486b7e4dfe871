"""The one decision which backend runs an operation on a cache, and why others were refused.

`KVQUANT_KERNELS` is "auto" (the default: CUDA kernels, then Triton kernels, then PyTorch),
"triton" (no CUDA kernels; on a CPU Triton needs its interpreter, `TRITON_INTERPRET=1`) or
"pytorch" (no GPU kernels).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kvquant.errors import UserError
from kvquant.kernels import (
    cuda_decode,
    cuda_expand_allocated,
    cuda_pack,
    cuda_pack_allocated,
    limits,
)
from kvquant.kernels.cache_shape import CacheShape
from kvquant.kernels.cuda_build import KernelUnavailable
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.cuda_pack import PackShape
from kvquant.kernels.cuda_pack_allocated import AllocatedPackShape

Operation = Literal["pack", "decode", "past", "prompt"]
Backend = Literal["cuda", "triton", "pytorch"]

# What an operation is called in a report, and its backends in the order in which they are asked. A
# decode step that the CUDA kernel refuses is attention over a packed past like any other.
TITLES: dict[Operation, str] = {
    "pack": "quantize and pack",
    "decode": "decode step",
    "past": "attention over a packed past",
    "prompt": "8-bit attention of a prompt",  # decided in `prompt_backend`, without a cache
}
CANDIDATES: dict[Operation, dict[Backend, limits.Limits]] = {
    "pack": {
        "cuda": limits.cuda_pack,
        "triton": limits.triton_pack,
        "pytorch": limits.pytorch_pack,
    },
    "decode": {
        "cuda": limits.cuda_decode,
        "triton": limits.triton_past,
        "pytorch": limits.no_limits,
    },
    "past": {"triton": limits.triton_past, "pytorch": limits.no_limits},
}
MIN_CAPABILITY = (8, 0)  # of the CUDA kernels: warp reductions, bf16


@dataclass(frozen=True)
class DeviceFacts:
    """The properties of a device and its software that decide which kernels run there.

    Attributes:
        type: "cuda", "cpu" or another type of torch device.
        index: Number of the GPU.
        capability: Compute capability of the GPU.
        nvrtc: Why the CUDA kernels cannot be compiled; None if they can.
        triton: Whether the package is installed.
        interpreter: Whether Triton's interpreter takes the place of a GPU.
    """

    type: str
    index: int = 0
    capability: tuple[int, int] = (0, 0)
    nvrtc: str | None = None
    triton: bool = True
    interpreter: bool = False


@functools.cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Returns the facts about a device, found once per process without allocating memory on it.

    Raises:
        UserError: It is a GPU, and this process sees none.
    """
    triton = importlib.util.find_spec("triton") is not None
    interpreter = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: no GPU is visible to this process; name the CPU, or make one visible"
        )
    if device.type != "cuda":
        return DeviceFacts(device.type, triton=triton, interpreter=interpreter)
    index = torch.cuda.current_device() if device.index is None else device.index
    capability = torch.cuda.get_device_capability(index)
    return DeviceFacts("cuda", index, capability, _nvrtc_problem(), triton, interpreter)


def _nvrtc_problem() -> str | None:
    """Why NVRTC cannot be used, or None."""
    try:
        from cuda.bindings import nvrtc

        error = nvrtc.nvrtcVersion()[0]
    except (ImportError, RuntimeError) as problem:  # the second: the library itself is missing
        return str(problem).splitlines()[0]
    return str(error) if int(error) else None


@dataclass(frozen=True)
class Selection:
    """The backend of an operation and the reasons against those that come before it.

    Attributes:
        operation: What is to be done.
        backend: The one that does it; None if each was refused.
        refused: Each backend that was refused, with at least one reason.
    """

    operation: Operation
    backend: Backend | None
    refused: tuple[tuple[Backend, tuple[str, ...]], ...]

    def reasons(self, backend: Backend) -> tuple[str, ...]:
        """Returns the sentences why a backend was refused; none if it was selected or not asked."""
        return dict(self.refused).get(backend, ())

    def lines(self) -> list[str]:
        """Returns the decision for people: first the backend, then a line per reason."""
        told = [f"{TITLES[self.operation]}: {self.backend or 'no backend'}"]
        for backend, reasons in self.refused:
            told += [f"  not {backend}: {reason}" for reason in reasons]
        return told


def wish() -> str:
    """Returns the value of `KVQUANT_KERNELS`.

    Raises:
        UserError: It is not one of the three.
    """
    found = os.environ.get("KVQUANT_KERNELS") or "auto"  # an unset variable of a shell is empty
    if found not in ("auto", "pytorch", "triton"):
        raise UserError(f"KVQUANT_KERNELS: '{found}' is none of auto, pytorch, triton")
    return found


def select(operation: Operation, shape: CacheShape, device: torch.device) -> Selection:
    """Decides which backend runs an operation; a CUDA kernel is compiled and loaded for that.

    An answer is kept for the next call with the same arguments, and the device is never waited for.

    Args:
        operation: "pack", "decode" (one new token per sequence) or "past" (any number of them).
        shape: Of the cache.
        device: Where the cache lies.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the three.
    """
    return decide(operation, shape, device_facts(device), wish())


def demand(operation: Operation, backend: Backend, shape: CacheShape, device: torch.device) -> None:
    """Refuses to go on if another backend was selected than the one that shall be measured.

    Raises:
        UserError: Says every reason.
    """
    selection = select(operation, shape, device)
    if selection.backend != backend:
        told = f"{TITLES[operation]}: {backend} does not take this shape"
        raise UserError(". ".join((told, *selection.reasons(backend))))


def report(shape: CacheShape, device: torch.device) -> dict[Operation, Selection]:
    """Returns the backend of each operation for a model's shape, without compiling or allocating.

    Args:
        shape: Of a cache that is still empty.
        device: Where it shall lie.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the three.
    """
    facts, wished = device_facts(device), wish()
    pack = decide("pack", shape, facts, wished, load=False)
    packed = replace(shape, packed_by_kernels=pack.backend in ("cuda", "triton"))
    return {
        "pack": pack,
        "decode": decide("decode", packed, facts, wished, load=False),
        "past": decide("past", packed, facts, wished, load=False),
    }


@functools.lru_cache(maxsize=1024)  # a cache that grows has a shape per number of arenas
def decide(
    operation: Operation, shape: CacheShape, facts: DeviceFacts, wished: str, *, load: bool = True
) -> Selection:
    """Returns the decision as a function of all that it depends on; see :func:`select`.

    Args:
        operation: See :func:`select`.
        shape: Of the cache.
        facts: About its device.
        wished: Value of `KVQUANT_KERNELS`.
        load: Whether a CUDA kernel must also compile and load.
    """
    refused: list[tuple[Backend, tuple[str, ...]]] = []
    for backend, limit in CANDIDATES[operation].items():
        reasons = [*refusals(backend, facts, wished), *limit(shape)]
        if operation != "pack" and backend == "triton":
            reasons += _query_refusals(shape, wished)
            if shape.codebook == "allocated":  # a CUDA kernel expands the blocks
                reasons += _cuda_refusals(facts, wished)
        expands = operation != "pack" and backend == "triton" and shape.codebook == "allocated"
        if load and (backend == "cuda" or expands) and not reasons:
            reasons += _load_refusals(operation, shape, facts.index, expands=expands)
        if not reasons:
            return Selection(operation, backend, tuple(refused))
        refused.append((backend, tuple(dict.fromkeys(reasons))))
    return Selection(operation, None, tuple(refused))


def refusals(backend: Backend, facts: DeviceFacts, wished: str) -> Iterator[str]:
    """Yields the reasons of the environment and of the device against a backend."""
    if backend == "pytorch":
        return
    if wished == "pytorch":
        yield "KVQUANT_KERNELS: 'pytorch' turns GPU kernels off; unset it or set it to auto"
    if backend == "cuda":
        yield from _cuda_refusals(facts, wished)
        return
    if not facts.triton:
        yield "triton: the package is not installed; install it (pip install triton)"
    if facts.type == "cuda" or (facts.interpreter and wished == "triton"):
        return
    if wished == "triton":
        yield (
            f"TRITON_INTERPRET: on a device of type {facts.type} Triton needs its interpreter; set "
            "it to 1 before Python starts, or move the model to a GPU"
        )
    else:
        yield f"device: {facts.type} is not a GPU that CUDA drives; move the model to one"


def _cuda_refusals(facts: DeviceFacts, wished: str) -> Iterator[str]:
    if wished == "triton":
        yield "KVQUANT_KERNELS: 'triton' leaves the CUDA kernels out; unset it or set it to auto"
    if facts.type != "cuda":
        yield f"device: {facts.type} is not a GPU that CUDA drives; move the model to one"
        return
    if facts.capability < MIN_CAPABILITY:
        found, least = (".".join(map(str, c)) for c in (facts.capability, MIN_CAPABILITY))
        yield f"device: compute capability {found} is below {least}; use an A100 or a later GPU"
    if facts.nvrtc is not None:
        yield (
            f"cuda-bindings: NVRTC cannot be used ({facts.nvrtc}); install a CUDA build of torch, "
            "which brings it along"
        )


def _query_refusals(shape: CacheShape, wished: str) -> Iterator[str]:
    """Yields why Triton does not take fp32 queries: tensor cores have no such arithmetic."""
    dtype = shape.query_dtype or shape.dtype
    if dtype not in limits.HALF and wished != "triton":
        name = str(dtype).removeprefix("torch.")
        yield (
            f"query_dtype: {name} queries are slow without tensor cores; load the model in float16 "
            "or bfloat16, or demand the kernels by KVQUANT_KERNELS=triton"
        )


def _load_refusals(
    operation: Operation, shape: CacheShape, index: int, *, expands: bool
) -> Iterator[str]:
    """Yields the reason why a kernel that should run does not compile or load.

    Args:
        operation: See :func:`select`.
        shape: Of the cache.
        index: Number of the GPU.
        expands: Whether it is the kernel that expands blocks.
    """
    kernel = shape.pack_kernel if operation == "pack" else shape.decode_shape
    if (problem := _load_problem(kernel, index, expands=expands)) is not None:
        yield (
            f"kernel: it does not compile or load ({problem.splitlines()[0]}); report this, or set "
            "KVQUANT_KERNELS=triton"
        )


@functools.cache
def _load_problem(
    shape: DecodeShape | PackShape | AllocatedPackShape, index: int, *, expands: bool
) -> str | None:
    """Why a CUDA kernel does not compile or load, or None; a failure is also warned of, once."""
    try:
        if isinstance(shape, DecodeShape) and expands:
            cuda_expand_allocated.function(shape, index)
        elif isinstance(shape, DecodeShape):
            cuda_decode.functions(shape, index)
        elif isinstance(shape, AllocatedPackShape):
            cuda_pack_allocated.functions(shape, index)
        else:
            cuda_pack.functions(shape, index)
    except KernelUnavailable as problem:
        read = "expansion" if expands else "decode"
        name = read if isinstance(shape, DecodeShape) else "packing"
        warnings.warn(f"no CUDA {name} kernel, another backend instead: {problem}", stacklevel=2)
        return str(problem) or type(problem).__name__
    return None
