"""`EnergyMonitor`: joules and seconds of a stretch of work, from the best meter there is."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from kvquant.energy.estimate import EstimatedMeter, open_cpu_meter
from kvquant.energy.nvml import NvmlMeter, NvmlPowerMeter, gpu_handles, visible_uuids


class Meter(Protocol):
    """A source of energy readings."""

    source: Literal["nvml", "estimated"]
    method: str

    def read(self) -> float:
        """Joules since some fixed moment."""
        ...

    def telemetry(self) -> list[dict[str, Any]]:
        """One mapping a device: clocks, temperature, power, whatever the source knows now."""
        ...

    def close(self) -> None:
        """Releases what the meter holds."""
        ...


def open_meter(
    device_type: str,
    *,
    nvml: Any = None,
    find_uuids: Callable[[], list[str] | None] = visible_uuids,
) -> Meter:
    """The best meter for a device.

    Args:
        device_type: "cuda" or "cpu".
        nvml: The pynvml module; None imports it.
        find_uuids: UUIDs of the GPUs to count.

    Returns:
        For a GPU the energy counter, else integrated power, else an estimate whose method says
        why; for a CPU RAPL, else an estimate.
    """
    if device_type != "cuda":
        return open_cpu_meter()
    try:
        library = nvml if nvml is not None else importlib.import_module("pynvml")
        handles = gpu_handles(library, find_uuids())
        try:
            return NvmlMeter(library, handles)
        except Exception:  # counters are missing on older GPUs and hidden on shared ones
            return NvmlPowerMeter(library, handles)
    except Exception as error:
        meter = EstimatedMeter()
        meter.method += f" (processor only; NVML: {error})"
        return meter


@dataclass(frozen=True)
class Reading:
    """Energy of a stretch of work."""

    joules: float
    seconds: float


class EnergyMonitor:
    """Measures stretches of work between `start()` and `stop()`.

    Args:
        meter: Where readings come from.
        wait: Waits until the device has nothing left to do; called at both ends.
        now: Seconds; for tests.
        sleep: For tests.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        wait: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.meter = meter
        self._wait = wait
        self._now = now
        self._sleep = sleep
        self._started = (0.0, 0.0)

    def start(self) -> None:
        """Begins a stretch."""
        self._wait()
        self._started = (self._now(), self.meter.read())

    @property
    def elapsed(self) -> float:
        """Seconds since `start()`."""
        return self._now() - self._started[0]

    def stop(self) -> Reading:
        """Ends the stretch."""
        self._wait()
        joules = self.meter.read() - self._started[1]
        return Reading(joules, self.elapsed)

    def idle_watts(self, seconds: float) -> float:
        """Mean power while nothing runs, over `seconds`; 0 if `seconds` is 0."""
        if seconds <= 0:
            return 0.0
        self.start()
        self._sleep(seconds)
        reading = self.stop()
        return reading.joules / reading.seconds
