"""Claims of GPUs by processes on one machine, so that each gets the least used GPU.

A claim is a locked file in a folder of the user. The kernel releases the lock (`flock`) when the
process ends, however it ends. GPUs are named by their UUIDs, so their numbers in
CUDA_VISIBLE_DEVICES do not matter. If only one GPU is visible, as on Slurm, it is that one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from kvquant.energy.gpus import load_nvml, torch_uuid, visible_gpus
from kvquant.errors import UserError
from kvquant.runtime.private_folder import private_folder
from kvquant.runtime.progress import note

if TYPE_CHECKING:
    import torch

_ALONE = ".alone"
_BUSY = 1000  # a timed process counts as many evaluations
_held: dict[Path, IO[str]] = {}  # open files, so that the locks live as long as this process


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"kvquant-gpus-{os.getuid()}"


def visible_devices() -> list[str]:
    """Returns the names of the devices that this process may use, in torch's order.

    The names are UUIDs (a MIG slice has its own), so that a device has the same name under every
    CUDA_VISIBLE_DEVICES.
    """
    import torch

    count = torch.cuda.device_count()
    return [torch_uuid(torch.device("cuda", i)) or _planned(i) for i in range(count)]


def _planned(index: int) -> str:
    """Returns a device's UUID from NVML, for when torch reports none, or else its index."""
    try:
        return visible_gpus(load_nvml())[index].uuid or str(index)
    except Exception:  # no NVML, or fewer GPUs
        return str(index)


def set_current(device: torch.device) -> torch.device:
    """Makes a CUDA device torch's current one, on which kernels are launched, and returns it."""
    import torch

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device.index)
    return device


def _locked(handle: IO[str], *, wait: bool = False) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a block for the same folder, which is made if missing.

    Raises:
        OSError: The folder cannot be made, or another user can write it and could place links.
    """
    if private_folder(folder) is None:
        raise OSError(f"{folder} is not a folder of this user alone")
    with (folder / "lock").open("a", encoding="utf-8") as handle:
        _locked(handle, wait=True)
        yield


def _others(folder: Path, name: str) -> tuple[int, int]:
    """Counts the (evaluations, timed jobs) of other processes on a GPU and removes stale files."""
    found = [0, 0]
    for file in folder.glob(f"{name}.*"):
        if file in _held:
            continue
        with file.open("a", encoding="utf-8") as handle:
            if _locked(handle):
                file.unlink()
            else:
                found[file.suffix == _ALONE] += 1
    return found[0], found[1]


def _hold(folder: Path, name: str, suffix: str) -> None:
    handle, path = tempfile.mkstemp(prefix=f"{name}.", suffix=suffix, dir=folder)
    stream = os.fdopen(handle, "a", encoding="utf-8")
    _locked(stream)
    _held[Path(path)] = stream


def claim_shared(names: Sequence[str], folder: Path | None = None) -> int:
    """Claims a share of the GPU with the fewest processes until this process ends.

    Args:
        names: UUIDs of the GPUs to choose from.
        folder: Folder of the locks; None is the user's folder for temporary files.

    Returns:
        The index of the chosen GPU. If files cannot be locked, the process id decides.
    """
    place = folder or _folder()
    try:
        with one_at_a_time(place):  # otherwise two processes could choose the same GPU
            loads = []
            for name in names:
                evaluations, timed = _others(place, name)
                loads.append(evaluations + _BUSY * timed)
            index = loads.index(min(loads))
            _hold(place, names[index], ".shared")
            return index
    except OSError:
        return os.getpid() % len(names)


def claim_alone(name: str, folder: Path | None = None) -> None:
    """Claims a whole GPU for a timed job until this process ends.

    Args:
        name: UUID of the GPU.
        folder: Folder of the locks; None is the user's folder for temporary files.

    Raises:
        UserError: Other processes use the GPU, which would disturb the timing.
    """
    place = folder or _folder()
    try:
        with one_at_a_time(place):  # otherwise two processes could choose the same GPU
            count = sum(_others(place, name))
            if not count:
                _hold(place, name, _ALONE)
    except OSError:
        return
    if count:
        raise UserError(
            f"--device: {count} other process(es) of kvquant use this GPU, and timing needs it "
            "alone: wait for them, or let the workflow run both (it keeps them apart)"
        )


def claim(device: str) -> str:
    """Claims the device of an evaluation: for "cuda" and "auto" the least used visible GPU.

    The device becomes torch's current one, on which kernels are launched. "cpu" and "cuda:N" are
    returned as they are, but "cuda:N" is also claimed, so that timed jobs see that it is in use.
    """
    import torch  # not at the top, as claims need no torch

    if not device.startswith(("auto", "cuda")) or not torch.cuda.is_available():
        return device
    names = visible_devices()
    if device not in ("auto", "cuda"):
        number = device.removeprefix("cuda:")  # `resolve_device` refuses anything but a number
        if number.isdecimal() and int(number) < len(names):
            claim_shared([names[int(number)]])
        return device
    index = claim_shared(names)
    torch.cuda.set_device(index)
    if len(names) > 1:
        note(f"on GPU {index} of {len(names)}")
    return f"cuda:{index}"
