"""Energy meters.

`NvmlMeter` reads the total-energy counter of all visible GPUs (board energy; it refreshes about
every 100 ms, so a trial must last seconds). `EstimatedMeter` is for machines without counters: the
processor's share of its nominal power times its busy time; its numbers are marked and carry no
claim.
"""

from __future__ import annotations

import os
import time
from typing import Any, Literal, Protocol

import psutil


class Meter(Protocol):
    """A source of energy readings."""

    source: Literal["nvml", "estimated"]
    method: str

    def read(self) -> float:
        """Joules since some fixed moment."""
        ...

    def telemetry(self) -> dict[str, Any]:
        """Clocks, temperature, power: whatever the source knows now."""
        ...


class NvmlMeter:
    """GPU board energy from NVML."""

    source: Literal["nvml", "estimated"] = "nvml"
    method = "GPU board energy, NVML total energy counter"

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        if not self._handles:
            raise RuntimeError("no GPU")
        self.read()

    def read(self) -> float:
        """Joules since the driver was loaded, all GPUs."""
        total = sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self._handles)
        return total / 1e3

    def telemetry(self) -> dict[str, Any]:
        """Of the first GPU: SM clock (MHz), temperature (C), power and its limit (W)."""
        n, handle = self._nvml, self._handles[0]
        return {
            "sm_clock_mhz": n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_SM),
            "temperature_c": n.nvmlDeviceGetTemperature(handle, n.NVML_TEMPERATURE_GPU),
            "power_w": n.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "power_limit_w": n.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        }


class EstimatedMeter:
    """An estimate from this process's processor time.

    Args:
        watts_per_core: Nominal power of a busy core. 4 W is about a server processor's thermal
            design power over its cores (280 W / 64).
        idle_watts: Nominal power of the machine's share when idle.
    """

    source: Literal["nvml", "estimated"] = "estimated"

    def __init__(self, watts_per_core: float = 4.0, idle_watts: float = 4.0) -> None:
        self._per_core = watts_per_core
        self._idle = idle_watts
        self._process = psutil.Process()
        self.method = (
            f"estimate: {watts_per_core} W a busy core times processor time, plus {idle_watts} W "
            "idle; no counter was read"
        )

    def read(self) -> float:
        """Estimated joules."""
        times = self._process.cpu_times()
        return (times.user + times.system) * self._per_core + time.monotonic() * self._idle

    def telemetry(self) -> dict[str, Any]:
        """Number of processors and their clock."""
        clock = psutil.cpu_freq()
        return {"cpus": os.cpu_count(), "clock_mhz": clock.current if clock else None}


def open_meter(device_type: str) -> Meter:
    """The best meter for "cuda" or "cpu"."""
    if device_type == "cuda":
        import pynvml

        try:
            return NvmlMeter(pynvml)
        except Exception as error:  # counters may be hidden in a virtual machine
            meter = EstimatedMeter()
            meter.method += f" (NVML: {error})"
            return meter
    return EstimatedMeter()


def idle_watts(meter: Meter, seconds: float) -> float:
    """Mean power while nothing runs, over `seconds`."""
    if seconds <= 0:
        return 0.0
    start, first = time.monotonic(), meter.read()
    time.sleep(seconds)
    return (meter.read() - first) / (time.monotonic() - start)
