"""Timing: synchronized clocks, percentiles, interleaved rounds, out-of-memory as a result."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from kvquant.records import Percentiles

MIN_ROUNDS = 5


def synchronize(device: torch.device) -> None:
    """Waits for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(milliseconds: list[float]) -> Percentiles:
    """Median and percentiles of rounds."""
    p10, p50, p90, p99 = np.percentile(milliseconds, [10, 50, 90, 99])
    return Percentiles(
        median=float(p50), p10=float(p10), p90=float(p90), p99=float(p99), n=len(milliseconds)
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def interleave(
    sides: list[Callable[[], None]],
    *,
    warmup: int,
    iterations: int,
    max_seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, list[bool]]:
    """Calls the sides in turns (A B A B ...) after a warm-up.

    Ends after `iterations` rounds or `max_seconds`, whichever comes first, but not before 5 rounds.
    A side that runs out of memory is not called again; the others go on.

    Args:
        sides: Each call measures itself.
        warmup: Rounds whose measurements the caller drops.
        iterations: Most rounds that count.
        max_seconds: Time after which no further round starts.
        clock: Seconds; for tests.

    Returns:
        The number of counted rounds, and for each side whether it fitted in memory.
    """
    fits = [True] * len(sides)
    rounds, start = 0, clock()
    for number in range(warmup + iterations):
        if number == warmup:
            start = clock()
        done = number - warmup
        if done >= MIN_ROUNDS and clock() - start >= max_seconds:
            break
        for i, side in enumerate(sides):
            if not fits[i]:
                continue
            try:
                side()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                fits[i] = False
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        if not any(fits):
            break
        rounds += number >= warmup
    return rounds, fits
