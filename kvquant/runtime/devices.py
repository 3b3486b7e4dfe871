"""Processes that share the GPUs of one machine: each takes the GPU with the fewest of them.

A process is a locked file in a folder of the user; the kernel gives the lock (`flock`) back when
the process ends, however it ends. GPUs are named by their UUIDs, so it does not matter how
CUDA_VISIBLE_DEVICES numbers them, and where it leaves one (Slurm), that one is taken.
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
_BUSY = 1000  # a timed process counts as so many others
_held: dict[Path, IO[str]] = {}  # open files, so that the locks live as long as this process


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"kvquant-gpus-{os.getuid()}"


def visible() -> list[str]:
    """Names of the devices that this process may use, in torch's order.

    They are UUIDs, so that another CUDA_VISIBLE_DEVICES gives the same device the same name; of a
    MIG slice its own.
    """
    import torch

    count = torch.cuda.device_count()
    return [torch_uuid(torch.device("cuda", i)) or _planned(i) for i in range(count)]


def _planned(index: int) -> str:
    """The UUID of a device whose UUID torch does not tell; its number if NVML does neither."""
    try:
        return visible_gpus(load_nvml())[index].uuid or str(index)
    except Exception:  # no NVML, or fewer GPUs
        return str(index)


def use(device: torch.device) -> torch.device:
    """Makes a CUDA device torch's current one, where kernels are launched; returns it."""
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
    """Inside, no other process is inside with the same folder, which is made if it is missing.

    Raises:
        OSError: It cannot be made, or another user can write it, who could put links in it.
    """
    if private_folder(folder) is None:
        raise OSError(f"{folder} is not a folder of this user alone")
    with (folder / "lock").open("a", encoding="utf-8") as handle:
        _locked(handle, wait=True)
        yield


def _others(folder: Path, name: str) -> tuple[int, int]:
    """(evaluations, timed jobs) of other living processes on a GPU; removes files of dead ones."""
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


def share(names: Sequence[str], folder: Path | None = None) -> int:
    """Takes a place on the GPU with the fewest processes until this process ends.

    Args:
        names: Of the GPUs.
        folder: Of the locks; None is the user's in the folder for temporary files.

    Returns:
        Its index. Where files cannot be locked, chosen by the process number.
    """
    place = folder or _folder()
    try:
        with one_at_a_time(place):  # else two processes would choose the same GPU
            loads = []
            for name in names:
                evaluations, timed = _others(place, name)
                loads.append(evaluations + _BUSY * timed)
            index = loads.index(min(loads))
            _hold(place, names[index], ".shared")
            return index
    except OSError:
        return os.getpid() % len(names)


def alone(name: str, folder: Path | None = None) -> None:
    """Takes a GPU for a timed job until this process ends.

    Raises:
        UserError: Other processes work on it, which would spoil what is timed.
    """
    place = folder or _folder()
    try:
        with one_at_a_time(place):  # else two processes would choose the same GPU
            count = sum(_others(place, name))
            if not count:
                _hold(place, name, _ALONE)
    except OSError:
        return
    if count:
        raise UserError(
            f"--device: {count} other process(es) of kvquant work on this GPU, and timing needs it "
            "alone: wait for them, or let the workflow run both (it keeps them apart)"
        )


def claim(device: str) -> str:
    """The device of an evaluation: for "cuda" and "auto" the visible GPU with the fewest processes.

    It becomes torch's current device, where kernels are launched. "cpu" and "cuda:N" are kept; a
    named GPU has a place taken on it, too, so that timed jobs see that it is in use.
    """
    import torch  # here and not above: places are taken and counted without it

    if not device.startswith(("auto", "cuda")) or not torch.cuda.is_available():
        return device
    names = visible()
    if device not in ("auto", "cuda"):
        number = device.removeprefix("cuda:")  # what is none, `resolve_device` refuses
        if number.isdecimal() and int(number) < len(names):
            share([names[int(number)]])
        return device
    index = share(names)
    torch.cuda.set_device(index)
    if len(names) > 1:
        note(f"on GPU {index} of {len(names)}")
    return f"cuda:{index}"
