"""Energy on machines without a GPU counter: RAPL if it can be read, else a model of power.

Neither measures the job alone, so both are marked `estimated` and support no claim.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from kvquant.energy.cpu import cpu_telemetry
from kvquant.energy.rapl import POWERCAP, RaplMeter, open_rapl

WATTS_PER_CORE = 4.0  # thermal design power per core of a server CPU, for example 280 W / 64
IDLE_SHARE = 0.3  # fraction of that power when nothing runs


class EstimatedMeter:
    """Estimates energy from CPU time and thermal design power.

    Power = watts_per_core * (idle_share * cores + (1 - idle_share) * busy cores), where the number
    of busy cores is the CPU time of this process, or of those of :meth:`count`, divided by the
    elapsed time.

    Args:
        watts_per_core: Power of a fully busy core, W.
        idle_share: Fraction of it that an idle core draws, 0 to 1.
        cores: Number of cores; None counts those that this process may use.
        now: Clock in seconds, which tests replace.
        busy: CPU seconds used so far, which tests replace.
    """

    source: Literal["nvml", "estimated"] = "estimated"

    def __init__(
        self,
        watts_per_core: float = WATTS_PER_CORE,
        idle_share: float = IDLE_SHARE,
        *,
        cores: int | None = None,
        now: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] | None = None,
    ) -> None:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._cores = cores or count or 1
        self._idle = watts_per_core * idle_share * self._cores
        self._extra = watts_per_core * (1 - idle_share)
        self._now = now
        self._busy = busy or self._processor_seconds
        self._processes = [psutil.Process()]
        self._used: dict[int, float] = {}
        self.method = (
            f"estimate, no counter was read: {watts_per_core:g} W a core (share of thermal design "
            f"power), {idle_share:.0%} of it when idle, {self._cores} cores"
        )

    def count(self, processes: Sequence[int]) -> None:
        """Counts the work of several processes from now on.

        Args:
            processes: Their ids.
        """
        self._processes, self._used = [psutil.Process(number) for number in processes], {}
        self.method += f", {len(processes)} processes"

    def _processor_seconds(self) -> float:
        for process in self._processes:
            with suppress(psutil.Error):  # one that has ended used no more
                times = process.cpu_times()
                self._used[process.pid] = float(times.user + times.system)
        return sum(self._used.values())

    def read(self) -> float:
        """Returns the estimated joules since some fixed moment."""
        return self._now() * self._idle + self._busy() * self._extra

    def telemetry(self) -> list[dict[str, Any]]:
        """Returns the CPU's clock and utilization."""
        return cpu_telemetry()

    def close(self) -> None:
        """Does nothing, as the meter holds nothing."""


def open_cpu_meter(powercap: Path = POWERCAP) -> EstimatedMeter | RaplMeter:
    """Opens RAPL if the counter of every package can be read, else the estimate."""
    found = open_rapl(powercap)
    if isinstance(found, RaplMeter):
        return found
    meter = EstimatedMeter()
    meter.method += f" ({found})"
    return meter
