"""Claims of GPUs by processes on one machine, so that each gets the least used ones.

A claim is a locked file in a folder of the user. The kernel releases the lock (`flock`) when the
process ends, however it ends. GPUs are named by their UUIDs, so their numbers in
CUDA_VISIBLE_DEVICES do not matter. If only one GPU is visible, as on Slurm, it is that one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from kvquant.energy.gpus import load_nvml, torch_uuid, visible_gpus
from kvquant.errors import UserError
from kvquant.runtime.private_folder import private_folder
from kvquant.runtime.progress import note
from kvquant.runtime.provenance import device_name

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


def _least_used(names: Sequence[str], count: int, folder: Path) -> tuple[list[int], int]:
    """Returns the GPUs that other processes use least, ascending, and how many processes use them.

    A timed job outweighs all evaluations. Of GPUs that are used alike, the first ones are taken.
    """
    found = [_others(folder, name) for name in names]
    loads = [evaluations + _BUSY * timed for evaluations, timed in found]
    chosen = sorted(sorted(range(len(names)), key=loads.__getitem__)[:count])
    return chosen, sum(sum(found[index]) for index in chosen)


def used_by_others(names: Sequence[str], folder: Path | None = None) -> int:
    """Returns how many claims other processes have of these GPUs; 0 if files cannot be locked.

    Args:
        names: UUIDs of the GPUs, as torch or NVML tell them.
        folder: Folder of the locks; None is the user's folder for temporary files.
    """
    place = folder or _folder()
    try:
        with one_at_a_time(place):
            each = {known for name in names for known in (name, name.removeprefix("GPU-"))}
            return sum(sum(_others(place, name)) for name in each)
    except OSError:
        return 0


def claim_shared(names: Sequence[str], count: int = 1, folder: Path | None = None) -> list[int]:
    """Claims a share of the GPUs with the fewest processes until this process ends.

    Args:
        names: UUIDs of the GPUs to choose from.
        count: Number of GPUs to claim, at most as many as there are names.
        folder: Folder of the locks; None is the user's folder for temporary files.

    Returns:
        The indices of the chosen GPUs, ascending. If files cannot be locked, the process id
        decides.
    """
    place = folder or _folder()
    try:
        with one_at_a_time(place):  # otherwise two processes could choose the same GPU
            chosen, _ = _least_used(names, count, place)
            for index in chosen:
                _hold(place, names[index], ".shared")
            return chosen
    except OSError:
        return sorted((os.getpid() + i) % len(names) for i in range(count))


def claim_alone(names: Sequence[str], count: int = 1, folder: Path | None = None) -> list[int]:
    """Claims the least used GPUs as a whole for a timed job until this process ends.

    Args:
        names: UUIDs of the GPUs to choose from.
        count: Number of GPUs to claim, at most as many as there are names.
        folder: Folder of the locks; None is the user's folder for temporary files.

    Returns:
        The indices of the chosen GPUs, ascending. If files cannot be locked, the first ones.

    Raises:
        UserError: Other processes use the GPUs, which would disturb the timing.
    """
    place = folder or _folder()
    try:
        with one_at_a_time(place):  # otherwise two processes could choose the same GPU
            chosen, others = _least_used(names, count, place)
            for index in () if others else chosen:
                _hold(place, names[index], _ALONE)
    except OSError:
        return list(range(count))
    if others:
        which = "this GPU" if len(names) == 1 else f"{count} of these {len(names)} GPUs"
        raise UserError(
            f"--device: {others} other process(es) of kvquant use {which}, and timing needs it "
            "alone: wait for them, or let the workflow run both (it keeps them apart)"
        )
    return chosen


def _check_count(visible: int, count: int, field: str, kind: str = "") -> None:
    """Refuses to use more GPUs than there are.

    Raises:
        UserError: There are fewer; the message names the field that asks for them.
    """
    if count > visible:
        raise UserError(
            f"{field}: {count} GPUs are asked for, but {visible}{kind} can be seen; ask for fewer, "
            "or show more (CUDA_VISIBLE_DEVICES, or the job's request on a cluster)"
        )


def _on_gpus(device: str) -> bool:
    """Returns whether a device's name stands for GPUs that torch sees."""
    import torch  # not at the top, as claims need no torch

    return device.startswith(("auto", "cuda")) and torch.cuda.is_available()


def _number(device: str, count: int) -> int | None:
    """Returns N of "cuda:N" if there is such a GPU; `resolve_device` refuses what else is named."""
    number = device.removeprefix("cuda:")
    return int(number) if number.isdecimal() and int(number) < count else None


def _named(
    device: str, names: Sequence[str], hold: Callable[[Sequence[str]], object]
) -> list[str] | None:
    """Claims the GPU that a device's name says; None where the name leaves the choice.

    Args:
        device: The name of a device on GPUs.
        names: UUIDs of the visible GPUs.
        hold: Claims GPUs by their UUIDs.

    Returns:
        The name of the device.
    """
    if device in ("auto", "cuda"):
        return None
    if (number := _number(device, len(names))) is None:
        return [device]
    hold([names[number]])
    return _taken([number], len(names))


def _taken(chosen: Sequence[int], visible: int, *, current: bool = True) -> list[str]:
    """Makes the first chosen GPU torch's current one, if asked, and returns the names of all."""
    import torch

    if visible > 1:  # a single one is current already
        if current:
            torch.cuda.set_device(chosen[0])
        several = "s" if len(chosen) > 1 else ""
        note(f"on GPU{several} {', '.join(map(str, chosen))} of {visible}")
    return [f"cuda:{index}" for index in chosen]


def claim(device: str, gpus: int = 1, field: str = "gpus") -> list[str]:
    """Claims the devices of an evaluation: for "cuda" and "auto" the least used visible GPUs.

    The first one becomes torch's current device, on which kernels are launched. "cuda:N" is
    claimed, too, so that timed jobs see that it is in use.

    Args:
        device: The name of a device.
        gpus: Number of GPUs for "cuda" and "auto"; 0 counts as 1.
        field: What asks for that number, in a message.

    Returns:
        The names of the devices: of `gpus`, or of the one that is named.

    Raises:
        UserError: Fewer GPUs are visible.
    """
    if not _on_gpus(device):
        return [device]
    names = visible_devices()
    if (named := _named(device, names, claim_shared)) is not None:
        return named
    count = max(1, gpus)
    _check_count(len(names), count, field)
    return _taken(claim_shared(names, count), len(names))


def claim_timed(
    device: str, gpus: int = 1, field: str = "gpus", *, current: bool = True
) -> list[str]:
    """Claims the GPUs of a timed job: for "cuda" and "auto" the least used ones.

    On a host of different GPUs these are among those that have the first one's name. The first GPU
    of the job becomes torch's current device.

    Args:
        device: The name of a device.
        gpus: Number of GPUs for "cuda" and "auto"; 0 counts as 1.
        field: What asks for that number, in a message.
        current: Whether this process works on them. Otherwise none becomes torch's current device,
            on which CUDA would take memory for this process.

    Returns:
        The names of the devices: of `gpus`, or of the one that is named.

    Raises:
        UserError: Fewer GPUs of one name are visible, or other processes of kvquant use them.
    """
    if not _on_gpus(device):
        return [device]
    import torch

    names = visible_devices()
    if (named := _named(device, names, claim_alone)) is not None:
        return named
    kinds = [device_name(torch.device("cuda", index)) for index in range(len(names))]
    alike = [index for index, kind in enumerate(kinds) if kind == kinds[0]]
    count = max(1, gpus)
    _check_count(len(alike), count, field, f" of the name {kinds[0]}")
    chosen = claim_alone([names[index] for index in alike], count)
    return _taken([alike[index] for index in chosen], len(names), current=current)
