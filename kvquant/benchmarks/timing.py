"""Timing by synchronized clocks and interleaved rounds, in which out of memory is a result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from kvquant.models.oom_retry import fits_in_memory
from kvquant.study.records import Percentiles

MIN_ROUNDS = 5
T = TypeVar("T")


def synchronize(*devices: torch.device) -> None:
    """Waits until GPUs are idle; does nothing for a CPU."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def reset_peak(devices: Sequence[torch.device]) -> None:
    """Resets torch's peaks of allocated memory."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(devices: Sequence[torch.device]) -> int:
    """Returns the sum of torch's peaks of allocated bytes on the devices; 0 on a CPU."""
    return sum(torch.cuda.max_memory_allocated(d) for d in devices if d.type == "cuda")


def held_bytes(devices: Sequence[torch.device]) -> int:
    """Returns the sum of torch's allocated bytes on the devices; 0 on a CPU."""
    return sum(torch.cuda.memory_allocated(d) for d in devices if d.type == "cuda")


class Clock:
    """Times a region of work in milliseconds.

    The device is synchronized before and after the region, and the host's clock is read in between.
    Events on one stream would miss work that a region starts on another stream.

    Args:
        wait: Waits until the device is idle.
        now: Clock in seconds.
    """

    def __init__(
        self,
        wait: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._wait = wait
        self._now = now

    @classmethod
    def of(cls, *devices: torch.device) -> Clock:
        """Returns a clock for work on `devices`."""
        return cls(wait=lambda: synchronize(*devices))

    def time(self, region: Callable[[], T]) -> tuple[T, float]:
        """Runs the region and returns its result and its time in milliseconds."""
        self._wait()
        start = self._now()
        result = region()
        self._wait()
        return result, (self._now() - start) * 1e3


def summarize(milliseconds: list[float]) -> Percentiles:
    """Returns median and percentiles of the times of rounds."""
    p10, p50, p90, p99 = np.percentile(milliseconds, [10, 50, 90, 99])
    return Percentiles(
        median=float(p50), p10=float(p10), p90=float(p90), p99=float(p99), n=len(milliseconds)
    )


def interleave(
    sides: list[Callable[[], object]],
    *,
    warmup: int,
    iterations: int,
    max_seconds: float,
    least: int | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[int, list[bool]]:
    """Calls the sides in turns (A B A B ...) after a warm-up.

    The rounds end after `iterations` or `max_seconds`, whichever comes first, but not before
    `least` rounds. A side that runs out of memory is not called again, while the others continue.

    Args:
        sides: Functions that measure themselves.
        warmup: Number of first rounds, whose measurements the caller drops.
        iterations: Largest number of counted rounds.
        max_seconds: Seconds after which no further round starts, without the warm-up.
        least: Smallest number of counted rounds; None: `MIN_ROUNDS`.
        now: Clock in seconds, which tests replace.

    Returns:
        The number of counted rounds, and for each side whether it fitted in memory.
    """
    fits = [True] * len(sides)

    def one_round() -> bool:
        for i, side in enumerate(sides):
            fits[i] = fits[i] and fits_in_memory(side)
        return any(fits)

    for _ in range(warmup):
        if not one_round():
            return 0, fits
    rounds, start = 0, now()
    least = MIN_ROUNDS if least is None else least
    while rounds < max(iterations, least):
        if rounds >= least and now() - start >= max_seconds:
            break
        if not one_round():
            break
        rounds += 1
    return rounds, fits
