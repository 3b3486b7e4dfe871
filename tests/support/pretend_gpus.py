"""Several GPUs on a machine without any: tensors that say so, and that refuse to be mixed.

A tensor on a pretended GPU computes on the CPU, but its `device` is `cuda:N`. As on GPUs, an
operation on tensors of two devices is an error, and only copies go from one to the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvquant.kernels import backends

COPIES = ("copy_", "_to_copy", "to", "_copy_from", "set_")
# A tensor on a GPU may be indexed by one on the CPU.
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class PretendTensor(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> PretendTensor:
        """Wraps a tensor for a device with an index."""
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation outside of :class:`PretendGpus`."""
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """The address that emulated kernels read."""
        return self.held.data_ptr()

    def __deepcopy__(self, memo: Any) -> PretendTensor:
        """A copy on the same device; torch's own copies the storage, of which there is none."""
        return PretendTensor(self.held.clone(), self.device)

    def tolist(self) -> Any:
        """The numbers, which torch itself does not read from subclasses."""
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        """Names the device that is pretended."""
        return f"{self.held!r} on {self.device}"


def with_index(device: torch.device) -> torch.device:
    """The device that is meant, as no GPU is the current one."""
    return device if device.index is not None else torch.device(device.type, 0)


def mapped(x: Any, each: Callable[[Any], Any]) -> Any:
    """What a function makes of all that tuples, lists and dicts hold.

    Models call thousands of operations; torch's own function for this takes most of their time.
    """
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([mapped(part, each) for part in x])
    if kind is dict:
        return {name: mapped(part, each) for name, part in x.items()}
    return each(x)


@functools.cache
def _name(func: Any) -> str:
    """The name of an operation."""
    return str(func._schema.name).removeprefix("aten::")


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU and says where its results are.

    Raises:
        RuntimeError: Tensors of several devices are mixed.
    """
    name = _name(func)
    where: list[torch.device] = []
    wrappers: dict[int, PretendTensor] = {}
    asked: list[torch.device] = []
    on_cpu: list[torch.Tensor] = []

    def plain(x: Any) -> Any:
        if isinstance(x, PretendTensor):
            where.append(x.device)
            wrappers[id(x.held)] = x
            return x.held
        if isinstance(x, torch.Tensor) and x.dim():
            on_cpu.append(x)
        if isinstance(x, torch.device):
            asked.append(x)
            return torch.device("cpu") if x.type == "cuda" else x
        return x

    args, kwargs = mapped(args, plain), mapped(kwargs, plain)
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    copies = name in COPIES
    if len(where) > 1 and len(set(where)) > 1 and not copies:
        raise RuntimeError(f"{func}: tensors on {', '.join(map(str, where))}")
    if where and on_cpu and not copies and name not in INDEXED:
        raise RuntimeError(f"{func}: tensors on {where[0]} and on the CPU")
    target = asked[-1] if asked else (where[0] if where else None)
    if name == "_fused_sdp_choice":
        return 0  # attention in plain operations
    out = func(*args, **kwargs)
    if target is None:
        return out
    moved = bool(asked) and any(device != with_index(asked[-1]) for device in where)

    def placed(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in wrappers and not moved:
            return wrappers[id(x)]
        if moved and id(x) in wrappers:
            x = x.clone()
        if target.type != "cuda":
            return x
        if x.is_inference() == torch.is_inference_mode_enabled():
            return PretendTensor(x, with_index(target))
        with torch.inference_mode(x.is_inference()):  # a view is what its base is
            return PretendTensor(x, with_index(target))

    return mapped(out, placed)


class PretendGpus(TorchDispatchMode):
    """Makes tensors on pretended GPUs where a device is asked for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch's guard against it costs time per operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :func:`run`."""
        return run(func, args, kwargs or {})


class Arrived:
    """Stands for a CUDA event behind work that is done at once."""

    def record(self, stream: Any = None) -> None:
        """Nothing is to be waited for."""

    def query(self) -> bool:
        """Whether the work is done."""
        return True


@contextmanager
def pretend_gpus(kernels: str = "pytorch") -> Iterator[None]:
    """Pretends that there are GPUs.

    Args:
        kernels: Value of `KVQUANT_KERNELS`, which by default turns kernels off. Others need
            emulated ones (`tests/kernels/emulate.py`), asked for afterwards.
    """
    if torch.cuda.is_available():
        pytest.skip("the GPUs of this machine are in the way of pretended ones")
    facts = backends.DeviceFacts("cuda")
    torch._C._ensureCUDADeviceGuardSet()  # what torch itself does for fake tensors without a GPU
    with pytest.MonkeyPatch.context() as patch, PretendGpus():
        patch.setenv("KVQUANT_KERNELS", kernels)

        def told(device: torch.device) -> backends.DeviceFacts:
            return facts

        patch.setattr(backends, "device_facts", told)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
        patch.setattr(torch.cuda, "Event", Arrived)
        patch.setattr(torch.cuda, "current_stream", lambda device: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda:1") copies
        overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # new parameters
        try:
            yield
            # Undone later, it would set this function again when there are no such GPUs any more.
            assert backends.device_facts is told, "undo within the block what was set in it"
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
            torch._C._set_only_lift_cpu_tensors(lifted)
