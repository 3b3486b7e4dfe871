"""Which GPUs a process sees and works on: CUDA_VISIBLE_DEVICES by NVML, torch's devices by UUID.

NVML numbers every GPU of the host by its place on the PCI bus; CUDA numbers those that it may see,
in the order of CUDA_VISIBLE_DEVICES. The two agree only by chance, so a GPU is known by its UUID.
Nothing here imports torch or starts CUDA until it is asked for a device of torch.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_UNKNOWN_GPUS = 64  # boards asked for at most: no host has more


@dataclass(frozen=True)
class Gpu:
    """One device as CUDA counts devices: a whole board, or a MIG slice of one.

    Attributes:
        handle: NVML handle of the device.
        board: NVML handle of the board; that of the device itself without MIG.
        uuid: "GPU-..." or "MIG-..."; empty if the driver does not say.
        name: As NVML spells it; a slice's name ends in its profile ("... MIG 3g.20gb").
        mig: Whether it is a slice.
    """

    handle: Any
    board: Any
    uuid: str
    name: str
    mig: bool = False


def _ask(nvml: Any, function: str, *args: Any) -> Any:
    """What NVML answers, None for what this GPU, driver or library does not know."""
    try:
        return getattr(nvml, function)(*args)
    except Exception:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")


def _profile(nvml: Any, slice_: Any) -> str:
    """The MIG profile of a slice, such as "3g.20gb" or "1c.3g.20gb"."""
    found = _ask(nvml, "nvmlDeviceGetAttributes", slice_)
    if found is None:
        return "MIG"
    slices, computes = int(found.gpuInstanceSliceCount), int(found.computeInstanceSliceCount)
    part = f"{computes}c." if computes < slices else ""
    return f"MIG {part}{slices}g.{round(found.memorySizeMB / 1024)}gb"


def _board(nvml: Any, handle: Any, uuid: str = "") -> Gpu:
    uuid = _text(_ask(nvml, "nvmlDeviceGetUUID", handle)) or uuid
    return Gpu(handle, handle, uuid, _text(_ask(nvml, "nvmlDeviceGetName", handle)))


def _slice(nvml: Any, handle: Any, board: Any, uuid: str = "") -> Gpu:
    uuid = _text(_ask(nvml, "nvmlDeviceGetUUID", handle)) or uuid
    name = _text(_ask(nvml, "nvmlDeviceGetName", handle))
    if "MIG" not in name:
        whole = name or _text(_ask(nvml, "nvmlDeviceGetName", board))
        name = f"{whole} {_profile(nvml, handle)}".strip()
    return Gpu(handle, board, uuid, name, mig=True)


def in_mig_mode(nvml: Any, board: Any) -> bool:
    """Whether a board is cut into MIG slices; CUDA then sees slices and not the board."""
    mode = _ask(nvml, "nvmlDeviceGetMigMode", board)
    return bool(mode and mode[0])


def slices(nvml: Any, board: Any) -> list[Gpu]:
    """The MIG slices of a board, in NVML's order."""
    count = _ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", board) or 0
    handles = [_ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", board, i) for i in range(count)]
    return [_slice(nvml, handle, board) for handle in handles if handle is not None]


def boards(nvml: Any) -> list[Gpu]:
    """The boards that this process may use, by their place on the PCI bus.

    NVML also counts boards that a container or a job of a cluster may not open; CUDA does not.
    """
    count = min(int(nvml.nvmlDeviceGetCount()), _UNKNOWN_GPUS)
    handles = [_ask(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(count)]
    return [_board(nvml, handle) for handle in handles if handle is not None]


def _leading_number(word: str) -> int | None:
    """A number at a word's start, as the driver reads it ("1gpu" is 1); None without one."""
    found = re.match(r"\s*\+?(\d+)", word)
    return int(found[1]) if found else None


def _by_prefix(word: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """The only GPU whose UUID begins so; UUIDs may be cut where they stay unique."""
    found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(word.lower())]
    return found[0] if len(found) == 1 else None


def _slice_by_place(nvml: Any, word: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """A slice named by its board and instances: "MIG-GPU-uuid/1/0", of older drivers."""
    board, _, place = word.removeprefix("MIG-").partition("/")
    for gpu in gpus:
        if gpu.uuid != board:
            continue
        for one in slices(nvml, gpu.board):
            ids = [
                _ask(nvml, f"nvmlDeviceGet{what}InstanceId", one.handle)
                for what in ("Gpu", "Compute")
            ]
            if "/".join(map(str, ids)) == place:
                return one
    return None


def visible_gpus(nvml: Any, environ: Mapping[str, str] | None = None) -> list[Gpu]:
    """The devices that CUDA will see in this environment, in its order, without starting CUDA.

    CUDA_VISIBLE_DEVICES is read as the driver reads it: numbers, or UUIDs that may be cut short,
    up to the first one that names nothing; a device named twice leaves none. A board in MIG mode
    stands for its first slice. Numbers count along the PCI bus. CUDA does so with
    CUDA_DEVICE_ORDER=PCI_BUS_ID; else it puts the fastest first, which only the driver can say:
    on a host of different GPUs a job therefore checks its device against the planned one.

    Args:
        nvml: The pynvml module, initialised.
        environ: Variables; None takes those of this process.
    """
    asked = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    whole = boards(nvml)
    # What a number or a board's UUID stands for; None for a board in MIG mode without a slice.
    seen = [
        next(iter(slices(nvml, gpu.board)), None) if in_mig_mode(nvml, gpu.board) else gpu
        for gpu in whole
    ]
    if asked is None:
        return [gpu for gpu in seen if gpu is not None]
    words = [word.strip() for word in asked.split(",")]
    kind = next((k for k in ("GPU-", "MIG-") if words[0].startswith(k)), "")
    every = [one for gpu in whole for one in slices(nvml, gpu.board)] if kind == "MIG-" else []
    chosen: list[Gpu] = []
    for word in words:
        found: Gpu | None = None
        if kind == "MIG-" and word.startswith("MIG-GPU-"):
            found = _slice_by_place(nvml, word, whole)
        elif kind == "MIG-" and word.startswith(kind):
            found = _by_prefix(word, every)
        elif kind == "GPU-" and word.startswith(kind):
            named = _by_prefix(word, whole)
            found = seen[whole.index(named)] if named else None
        elif not kind and (number := _leading_number(word)) is not None and number < len(seen):
            found = seen[number]
        if found is None:
            break
        if found in chosen:
            return []
        chosen.append(found)
    return chosen


def by_uuid(nvml: Any, uuid: str) -> Gpu:
    """The device with a UUID as torch tells it, with or without its prefix.

    Raises:
        LookupError: NVML knows no such device, or cannot tell which slice of a board it is.
    """
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    handle = _ask(nvml, "nvmlDeviceGetHandleByUUID", f"GPU-{bare}")
    if handle is not None:
        if not in_mig_mode(nvml, handle):
            return _board(nvml, handle, f"GPU-{bare}")
        # CUDA told the board of a slice: it is the one slice of this board that is visible.
        board = _board(nvml, handle, f"GPU-{bare}").uuid
        shown = [one for one in visible_gpus(nvml) if one.mig]
        same = [one for one in shown if _board(nvml, one.board).uuid == board]
        if len(same) == 1:
            return same[0]
        raise LookupError("which MIG slice the process works on cannot be told")
    handle = _ask(nvml, "nvmlDeviceGetHandleByUUID", f"MIG-{bare}")
    if handle is None:
        raise LookupError(f"NVML knows no GPU with torch's UUID '{bare}'")
    whole = _ask(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
    return _slice(nvml, handle, whole, f"MIG-{bare}")


def cuda_index(device: torch.device) -> int:
    """Torch's number of a CUDA device: its own, or the current device's."""
    import torch

    if device.index is not None:
        return device.index
    try:
        return int(torch.cuda.current_device())
    except (AssertionError, RuntimeError):  # no driver: nothing can have been chosen
        return 0


def torch_uuid(device: torch.device) -> str:
    """Torch's UUID of a CUDA device; empty if this torch does not tell."""
    import torch

    properties = torch.cuda.get_device_properties(cuda_index(device))
    return str(getattr(properties, "uuid", "") or "")


def visible_uuids() -> list[str] | None:
    """UUIDs of the devices that torch sees, in its order; None if it does not tell them all."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = [torch_uuid(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return found if found and all(found) else None


def gpu_of(nvml: Any, device: torch.device) -> Gpu:
    """The NVML device behind a CUDA device of torch.

    Raises:
        LookupError: Torch tells no UUID, or NVML does not know it.
    """
    uuid = torch_uuid(device)
    if uuid:
        return by_uuid(nvml, uuid)
    seen, index = visible_gpus(nvml), cuda_index(device)
    if index >= len(seen) or len({gpu.name for gpu in seen}) > 1:
        raise LookupError("this torch tells no UUIDs, so which GPU works cannot be told")
    return seen[index]


def load_nvml() -> Any:
    """The pynvml module, initialised.

    Raises:
        Exception: There is no library, no driver or no permission; its own kinds of error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a package that was its name once
        import pynvml

    pynvml.nvmlInit()
    return pynvml


def devices_of(parameters: Iterable[torch.Tensor]) -> list[torch.device]:
    """The devices that tensors lie on, each once, in order of first use."""
    return list(dict.fromkeys(t.device for t in parameters if t.device.type != "meta"))


def short_name(name: str) -> str:
    """The kebab-case name of a GPU in paths: "NVIDIA H100 80GB HBM3" gives "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("nvidia-")
