"""Turns of sides with very different speed, in which slow sides skip most rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from kvquant.benchmarks.timing import MIN_ROUNDS, fits_in_memory, summarize
from kvquant.errors import MissingPackage, UserError
from kvquant.study.kernels import KernelsSpec
from kvquant.study.records import KernelSide, Percentiles, Record, read_record

Role = Literal["ours", "copy", "fp16", "peer"]
Status = Literal["ok", "oom", "not installed", "refused", "failed"]


@dataclass
class Side:
    """One side of a measurement.

    Attributes:
        name: Name of the side in the record.
        role: Role of the side in comparisons.
        run: Runs one call and returns its milliseconds. Its first call raises
            :class:`MissingPackage` or :class:`UserError` if the side cannot be measured.
        nbytes: Bytes that the side must read and write, if they bound its time.
        cache_bytes: Bytes of the side's cache, known after a call.
        bits_per_element: Bits of the cache per key or value element.
        status: Outcome, set by :func:`take_turns`.
        reason: Reason why there is no time, set by :func:`take_turns`.
        times: Milliseconds of each counted round, None for skipped ones, set by
            :func:`take_turns`.
    """

    name: str
    role: Role
    run: Callable[[], float]
    nbytes: int | None = None
    cache_bytes: int | None = None
    bits_per_element: float | None = None
    status: Status = "ok"
    reason: str = ""
    times: list[float | None] | None = None

    def call(self) -> float | None:
        """Runs one call and returns its milliseconds, or None if the side cannot continue."""
        got: list[float] = []
        try:
            if fits_in_memory(lambda: got.append(self.run())):
                return got[0]
            self.status = "oom"
        except UserError as error:
            if self.role != "peer":
                raise
            self.status = "not installed" if isinstance(error, MissingPackage) else "refused"
            self.reason = str(error)
        except Exception as error:
            # A failure of a peer is a result and must not end the whole measurement.
            if self.role != "peer":
                raise
            self.status, self.reason = "failed", f"{type(error).__name__}: {error}".split("\n")[0]
        return None


def take_turns(
    sides: list[Side], spec: KernelsSpec, now: Callable[[], float] = time.perf_counter
) -> None:
    """Calls the sides in turns (A B C A B C ...) and stores their times in them.

    A side whose call in the warm-up takes longer than `spec.slow_seconds` takes part only in the
    first `spec.slow_rounds` rounds. The others end after `spec.rounds` rounds or, after at least 5,
    once `spec.max_seconds` have passed.

    Args:
        sides: The sides, which measure themselves.
        spec: Limits of rounds and time.
        now: Clock in seconds, which tests replace.
    """
    left = {side.name: spec.rounds for side in sides}
    for side in sides:
        side.times = []
    for _ in range(spec.warmup):
        for side in sides:
            if side.status == "ok" and left[side.name] == spec.rounds:
                taken = side.call()
                if taken is not None and taken > 1e3 * spec.slow_seconds:
                    left[side.name] = min(spec.slow_rounds, spec.rounds)
    start = now()
    for done in range(spec.rounds):
        if done >= MIN_ROUNDS and now() - start >= spec.max_seconds:
            break
        playing = [s for s in sides if s.status == "ok" and done < left[s.name]]
        if not playing:
            break
        for side in sides:
            assert side.times is not None
            side.times.append(side.call() if side in playing else None)


def paired(theirs: list[float | None], ours: list[float | None]) -> Percentiles | None:
    """Returns percentiles of their time over ours by round, or None without a common round."""
    both = zip(theirs, ours, strict=False)
    ratios = [t / o for t, o in both if t is not None and o is not None]
    return summarize(ratios) if ratios else None


def copy_rate(sides: list[Side]) -> float | None:
    """Returns the rate of the device copy among the sides in GB/s, or None."""
    for side in sides:
        times = [t for t in side.times or [] if t is not None]
        if side.role == "copy" and side.status == "ok" and side.nbytes and times:
            return side.nbytes / summarize(times).median / 1e6
    return None


def to_records(
    sides: list[Side], *, elements: int | None = None, lanes_per_s: float | None = None
) -> list[KernelSide]:
    """Returns the sides as parts of a record.

    Args:
        sides: The sides after :func:`take_turns`.
        elements: Key and value elements of a call times the query heads of a group.
        lanes_per_s: Thread instructions that the device can issue per second.
    """
    rate = copy_rate(sides)
    ours = next((s.times for s in sides if s.role == "ours" and s.status == "ok"), None)
    records = []
    for side in sides:
        record = KernelSide(side=side.name, role=side.role, status=side.status, reason=side.reason)
        times = [t for t in side.times or [] if t is not None]
        if side.status == "ok" and times:
            record.ms = summarize(times)
            record.cache_bytes = side.cache_bytes
            record.bits_per_element = side.bits_per_element
            if ours is not None and side.role in ("fp16", "peer"):
                record.over_ours = paired(side.times or [], ours)
            if side.nbytes is not None:
                record.nbytes = side.nbytes
                record.gb_per_s = side.nbytes / record.ms.median / 1e6
                if rate is not None:
                    record.copy_share = record.gb_per_s / rate
                    record.floor_ms = side.nbytes / rate / 1e6
            if elements is not None and lanes_per_s is not None and side.role == "ours":
                record.slots_per_element = record.ms.median * 1e-3 * lanes_per_s / elements
        records.append(record)
    return records


def issue_rate(device: torch.device) -> float | None:
    """Returns thread instructions per second that a GPU can issue at its highest clock, or None.

    A multiprocessor of every supported generation has four warp schedulers of 32 lanes.
    """
    if device.type != "cuda":
        return None
    try:
        from kvquant.energy.gpus import gpu_of, load_nvml

        nvml = load_nvml()
        handle = gpu_of(nvml, device).board
        megahertz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    except Exception:  # no library, or a driver that does not report it
        return None
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return float(count * 128 * megahertz * 1e6)


R = TypeVar("R", bound=Record)


def finished(file: Path, kind: type[R], digest: str) -> R | None:
    """Returns the record of a finished case, or None.

    Args:
        file: The record's file.
        kind: The type of the record.
        digest: The digest that the study asks for.

    Raises:
        UserError: The record is damaged or belongs to another specification.
    """
    if not file.is_file():
        return None
    record = read_record(file, kind)
    if record.spec_digest != digest:
        raise UserError(
            f"{file}: measured with another configuration (digest {record.spec_digest}, the study "
            f"has {digest}): delete it by name to measure again"
        )
    return record
