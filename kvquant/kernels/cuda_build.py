"""CUDA C++ kernels, compiled at run time by NVRTC, which every CUDA build of torch brings along.

Nothing is built at installation, and the machine needs no compiler. A kernel is compiled for the
constants of a cache (bits, head_dim, ...) when it is first used, in about two seconds, and kept on
disk (:mod:`kvquant.kernels.cubin_cache`). The constants reach the source as a generated header
(:mod:`kvquant.kernels.cuda_header`).
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from kvquant.kernels.cubin_cache import cached
from kvquant.kernels.cuda_header import HEADER_NAME


class KernelUnavailable(RuntimeError):
    """Raised where a kernel cannot be compiled or loaded; callers take the PyTorch path."""


def _check(result: tuple[Any, ...], doing: str) -> Any:
    """Returns the value of a `cuda.bindings` call, whose first item is its error."""
    error = result[0]
    if int(error) != 0:
        raise KernelUnavailable(f"{doing}: {error}")
    return result[1] if len(result) == 2 else result[1:]


def compile_cubin(source: str, header: str, architecture: str) -> bytes:
    """Compiles a source file in `kvquant/kernels/cuda` to machine code, which needs no GPU.

    Args:
        source: File name. It may include those that end with .cuh.
        header: Text of `generated.cuh` (:func:`kvquant.kernels.cuda_header.cuda_header`).
        architecture: For example "sm_90".

    Raises:
        KernelUnavailable: NVRTC is missing, or its messages.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelUnavailable(f"cuda-bindings is not installed ({error})") from None
    folder = resources.files("kvquant.kernels").joinpath("cuda")
    text = folder.joinpath(source).read_bytes()
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".cuh"))
    headers = {name: folder.joinpath(name).read_bytes() for name in names}
    headers[HEADER_NAME] = header.encode()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device"]
    flags = [option.encode() for option in options]
    try:
        version = _check(nvrtc.nvrtcVersion(), "NVRTC version")
    except RuntimeError as error:  # the library itself is missing
        raise KernelUnavailable(str(error)) from None
    key = [source.encode(), text, *headers.values(), str(version).encode(), *flags]
    return cached(key, lambda: _compile(nvrtc, source, text, headers, flags))


def _compile(
    nvrtc: Any, source: str, text: bytes, headers: dict[str, bytes], flags: list[bytes]
) -> bytes:
    """Compiles by NVRTC, without looking into the cache."""
    included = (len(headers), list(headers.values()), [name.encode() for name in headers])
    program = _check(nvrtc.nvrtcCreateProgram(text, source.encode(), *included), "NVRTC")
    status = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if int(status[0]) != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC log")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise KernelUnavailable(f"{source}: {log.decode(errors='replace').strip()}")
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "NVRTC size")
    _check((*nvrtc.nvrtcGetCUBIN(program, cubin), None), "NVRTC code")
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def index_of(x: torch.Tensor) -> int:
    """Returns the index of the GPU that holds a tensor."""
    return x.device.index if x.device.index is not None else torch.cuda.current_device()


def multiprocessors(index: int) -> int:
    """Returns the number of multiprocessors of a GPU."""
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


@dataclass(frozen=True)
class Module:
    """A source file that is compiled and loaded on a GPU.

    Attributes:
        handle: The driver's module.
        driver: `cuda.bindings.driver`.
        device: Index of the GPU, which need not be the current one.
    """

    handle: Any
    driver: Any
    device: int

    def number(self, name: str) -> int:
        """Reads an `int` constant of the module."""
        address, _ = _check(self.driver.cuModuleGetGlobal(self.handle, name.encode()), name)
        value = ctypes.c_int()
        with torch.cuda.device(self.device):
            self.driver.cuMemcpyDtoH(ctypes.addressof(value), address, 4)
        return value.value

    def function(self, name: str, shared_bytes: int = 0) -> Function:
        """Looks up a kernel.

        Args:
            name: Its name.
            shared_bytes: Dynamic shared memory of a launch, in bytes.
        """
        handle = _check(self.driver.cuModuleGetFunction(self.handle, name.encode()), name)
        if shared_bytes > 48 * 1024:
            attribute = self.driver.CUfunction_attribute
            name_of_limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            with torch.cuda.device(self.device):
                status = self.driver.cuFuncSetAttribute(handle, name_of_limit, shared_bytes)
            _check((*status, None), f"{name}: {shared_bytes} bytes of shared memory")
        return Function(handle, self.driver, shared_bytes, self.device)


@dataclass(frozen=True)
class Function:
    """A kernel, which is launched on torch's current stream.

    A kernel is loaded on one GPU, which must be the current one (`torch.cuda.device_of`).
    """

    handle: Any
    driver: Any
    shared_bytes: int
    device: int

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        *arguments: ctypes.Structure | ctypes._SimpleCData[Any],
    ) -> None:
        """Launches the kernel; the arguments are copied, so they may be reused at once."""
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        # `torch.cuda.current_stream` makes an object, which takes longer than a launch.
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        status = self.driver.cuLaunchKernel(
            self.handle, *grid, threads, 1, 1, self.shared_bytes, stream,
            ctypes.addressof(pointers), 0,
        )  # fmt: skip
        if int(status[0]) != 0:
            raise RuntimeError(f"launch of a CUDA kernel: {status[0]}")


@functools.cache
def load(source: str, header: str, device: int, *, own_instructions: bool = False) -> Module:
    """Compiles and loads a source file for a GPU, once per process.

    Args:
        source: File name in `kvquant/kernels/cuda`.
        header: Text of `generated.cuh`.
        device: CUDA device index.
        own_instructions: Whether it uses instructions that only this generation of GPUs has
            (Hopper's "sm_90a").
    """
    major, minor = torch.cuda.get_device_capability(device)
    suffix = "a" if own_instructions else ""
    cubin = compile_cubin(source, header, f"sm_{major}{minor}{suffix}")
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context the current one
        return Module(_check(driver.cuModuleLoadData(cubin), source), driver, device)
