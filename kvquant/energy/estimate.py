"""Energy on machines without a GPU counter: RAPL where it can be read, else a model of power.

Neither is a measurement of the job alone, so both are marked `estimated` and carry no claim.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 4.0  # thermal design power over cores of a server processor, say 280 W / 64
IDLE_SHARE = 0.3  # of that power when nothing runs


def _cpu_telemetry() -> list[dict[str, Any]]:
    try:
        clock = psutil.cpu_freq()
    except Exception:  # not told to a virtual machine
        clock = None
    return [
        {
            "device": "cpu",
            "clock_mhz": clock.current if clock else None,
            "utilization_percent": psutil.cpu_percent(),
        }
    ]


class EstimatedMeter:
    """The processor's share of its thermal design power.

    Power = watts_per_core * (idle_share * cores + (1 - idle_share) * busy cores), where the busy
    cores are this process's processor time over elapsed time.

    Args:
        watts_per_core: Power of a fully busy core, W.
        idle_share: Part of it that an idle core draws, 0 to 1.
        cores: Cores of the machine's share; None counts those this process may use.
        now: Seconds; for tests.
        busy: Processor seconds so far; for tests.
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
        self._process = psutil.Process()
        self.method = (
            f"estimate, no counter was read: {watts_per_core:g} W a core (share of thermal design "
            f"power), {idle_share:.0%} of it when idle, {self._cores} cores"
        )

    def _processor_seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def read(self) -> float:
        """Estimated joules."""
        return self._now() * self._idle + self._busy() * self._extra

    def telemetry(self) -> list[dict[str, Any]]:
        """The processor's clock and utilisation."""
        return _cpu_telemetry()

    def close(self) -> None:
        """Nothing to release."""


class RaplMeter:
    """Package energy counters of the processor, read from the powercap file system.

    They count everything that runs on the machine and neither memory nor power supply, which is
    why the source says `estimated`.

    Args:
        zones: Folders with `energy_uj` and `max_energy_range_uj`, one a package.
    """

    source: Literal["nvml", "estimated"] = "estimated"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._ranges = [int((z / "max_energy_range_uj").read_text()) for z in zones]
        self._last = [int((z / "energy_uj").read_text()) for z in zones]
        self._total = 0
        self.method = (
            f"rapl: energy counters of {len(zones)} processor package(s), whole machine; "
            "not the job alone, so marked estimated"
        )

    def read(self) -> float:
        """Joules since the meter was opened; counters that wrapped are unwrapped."""
        for i, zone in enumerate(self._zones):
            value = int((zone / "energy_uj").read_text())
            step = value - self._last[i]
            self._total += step if step >= 0 else step + self._ranges[i]
            self._last[i] = value
        return self._total / 1e6

    def telemetry(self) -> list[dict[str, Any]]:
        """The processor's clock and utilisation."""
        return _cpu_telemetry()

    def close(self) -> None:
        """Nothing to release."""


def open_cpu_meter(powercap: Path = POWERCAP) -> EstimatedMeter | RaplMeter:
    """RAPL if every package's counter can be read, else the estimate."""
    # Packages only: their sub-zones ("intel-rapl:0:0") are part of them.
    zones = [z for z in sorted(powercap.glob("*-rapl:*")) if z.name.count(":") == 1]
    if zones:
        try:
            return RaplMeter(zones)
        except (OSError, ValueError):  # usually readable by root only
            pass
    return EstimatedMeter()
