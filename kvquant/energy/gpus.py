"""The GPUs that a process sees and uses: CUDA_VISIBLE_DEVICES by NVML, torch's devices by UUID.

NVML numbers all GPUs of the host by their position on the PCI bus. CUDA numbers the visible ones in
the order of CUDA_VISIBLE_DEVICES. The two agree only by chance, so a GPU is identified by its UUID.
Nothing here imports torch or starts CUDA unless it is given a torch device.
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

MAX_BOARDS = 64  # no host has more


@dataclass(frozen=True)
class Gpu:
    """Describes one CUDA device: a whole board, or a MIG slice of one.

    Attributes:
        handle: NVML handle of the device.
        board: NVML handle of its board, the same as `handle` without MIG.
        uuid: "GPU-..." or "MIG-...", empty if the driver does not report it.
        name: NVML's name; the name of a slice ends in its profile ("... MIG 3g.20gb").
        mig: Whether the device is a MIG slice.
    """

    handle: Any
    board: Any
    uuid: str
    name: str
    mig: bool = False


def _ask(nvml: Any, function: str, *args: Any) -> Any:
    """Returns NVML's answer, or None if the GPU, driver or library does not support the query."""
    try:
        return getattr(nvml, function)(*args)
    except Exception:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")


def _profile(nvml: Any, slice_: Any) -> str:
    """Returns the MIG profile of a slice, such as "3g.20gb" or "1c.3g.20gb"."""
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
    """Returns whether a board is in MIG mode, in which CUDA sees its slices and not the board."""
    mode = _ask(nvml, "nvmlDeviceGetMigMode", board)
    return bool(mode and mode[0])


def slices(nvml: Any, board: Any) -> list[Gpu]:
    """Returns the MIG slices of a board, in NVML's order."""
    count = _ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", board) or 0
    handles = [_ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", board, i) for i in range(count)]
    return [_slice(nvml, handle, board) for handle in handles if handle is not None]


def boards(nvml: Any) -> list[Gpu]:
    """Returns the boards that this process may use, in the order of the PCI bus.

    NVML also counts boards that a container or a cluster job may not open, and CUDA does not.
    """
    count = min(int(nvml.nvmlDeviceGetCount()), MAX_BOARDS)
    handles = [_ask(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(count)]
    return [_board(nvml, handle) for handle in handles if handle is not None]


def _leading_number(word: str) -> int | None:
    """Returns the number that a word starts with, as the driver reads it ("1gpu" is 1), or None."""
    found = re.match(r"\s*\+?(\d+)", word)
    return int(found[1]) if found else None


def _by_prefix(word: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """Returns the GPU whose UUID starts with `word`, or None unless exactly one does."""
    found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(word.lower())]
    return found[0] if len(found) == 1 else None


def _slice_by_place(nvml: Any, word: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """Returns the slice that older drivers name by board and instances: "MIG-GPU-uuid/1/0"."""
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
    """Returns the devices that CUDA will see, in CUDA's order, without starting CUDA.

    CUDA_VISIBLE_DEVICES is read as the driver reads it: a list of numbers or of UUIDs, which may be
    abbreviated, up to the first entry that names no device. A device that is named twice leaves no
    devices at all. A board in MIG mode stands for its first slice. Numbers are taken as positions
    on the PCI bus. CUDA does so only with CUDA_DEVICE_ORDER=PCI_BUS_ID and otherwise starts with
    the fastest GPU, which only the driver knows. On a host with different GPUs a job therefore
    checks its device against the planned one.

    Args:
        nvml: The initialized pynvml module.
        environ: Environment variables; None takes those of this process.
    """
    asked = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    whole = boards(nvml)
    # The device of each number or board UUID; None for a board in MIG mode without slices.
    seen = [
        next(iter(slices(nvml, gpu.board)), None) if in_mig_mode(nvml, gpu.board) else gpu
        for gpu in whole
    ]
    if asked is None:
        return [gpu for gpu in seen if gpu is not None]
    words = [word.strip() for word in asked.split(",")]
    prefix = next((p for p in ("GPU-", "MIG-") if words[0].startswith(p)), "")
    every = [one for gpu in whole for one in slices(nvml, gpu.board)] if prefix == "MIG-" else []
    chosen: list[Gpu] = []
    for word in words:
        found: Gpu | None = None
        if prefix == "MIG-" and word.startswith("MIG-GPU-"):
            found = _slice_by_place(nvml, word, whole)
        elif prefix == "MIG-" and word.startswith(prefix):
            found = _by_prefix(word, every)
        elif prefix == "GPU-" and word.startswith(prefix):
            named = _by_prefix(word, whole)
            found = seen[whole.index(named)] if named else None
        elif not prefix and (number := _leading_number(word)) is not None and number < len(seen):
            found = seen[number]
        if found is None:
            break
        if found in chosen:
            return []
        chosen.append(found)
    return chosen


def by_uuid(nvml: Any, uuid: str) -> Gpu:
    """Returns the device with a UUID from torch, which may lack its prefix.

    Raises:
        LookupError: NVML knows no such device, or the slice of a board is ambiguous.
    """
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    handle = _ask(nvml, "nvmlDeviceGetHandleByUUID", f"GPU-{bare}")
    if handle is not None:
        if not in_mig_mode(nvml, handle):
            return _board(nvml, handle, f"GPU-{bare}")
        # CUDA reported the board of a slice: the one visible slice of this board is meant.
        board = _board(nvml, handle, f"GPU-{bare}").uuid
        shown = [one for one in visible_gpus(nvml) if one.mig]
        same = [one for one in shown if _board(nvml, one.board).uuid == board]
        if len(same) == 1:
            return same[0]
        raise LookupError("the MIG slice that the process works on cannot be identified")
    handle = _ask(nvml, "nvmlDeviceGetHandleByUUID", f"MIG-{bare}")
    if handle is None:
        raise LookupError(f"NVML knows no GPU with torch's UUID '{bare}'")
    whole = _ask(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
    return _slice(nvml, handle, whole, f"MIG-{bare}")


def cuda_index(device: torch.device) -> int:
    """Returns the index of a CUDA device in torch, which is the current device's by default."""
    import torch

    if device.index is not None:
        return device.index
    try:
        return int(torch.cuda.current_device())
    except (AssertionError, RuntimeError):  # no driver: nothing can have been chosen
        return 0


def torch_uuid(device: torch.device) -> str:
    """Returns torch's UUID of a CUDA device, or "" if this version of torch does not report it."""
    import torch

    properties = torch.cuda.get_device_properties(cuda_index(device))
    return str(getattr(properties, "uuid", "") or "")


def visible_uuids() -> list[str] | None:
    """Returns the UUIDs of torch's devices in its order, or None if torch does not report all."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = [torch_uuid(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return found if found and all(found) else None


def gpu_of(nvml: Any, device: torch.device) -> Gpu:
    """Returns the NVML device behind a CUDA device of torch.

    Raises:
        LookupError: Torch reports no UUID, or NVML does not know it.
    """
    uuid = torch_uuid(device)
    if uuid:
        return by_uuid(nvml, uuid)
    seen, index = visible_gpus(nvml), cuda_index(device)
    if index >= len(seen) or len({gpu.name for gpu in seen}) > 1:
        raise LookupError("this torch reports no UUIDs, so the GPU cannot be identified")
    return seen[index]


def load_nvml() -> Any:
    """Returns the initialized pynvml module.

    Raises:
        Exception: There is no library, driver or permission, as pynvml's own types of error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from another package of the same name
        import pynvml

    pynvml.nvmlInit()
    return pynvml


def devices_of(parameters: Iterable[torch.Tensor]) -> list[torch.device]:
    """Returns the devices of the tensors, each once, in order of first use."""
    return list(dict.fromkeys(t.device for t in parameters if t.device.type != "meta"))


def short_name(name: str) -> str:
    """Returns a GPU's kebab-case name for paths: "NVIDIA H100 80GB HBM3" is "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("nvidia-")
