"""Time and NVML that obey the test."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class FakeTime:
    """Seconds that pass by sleeping."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeNvml:
    """Two GPUs of constant power whose energy counters refresh every 100 ms.

    Args:
        time: The clock that the counters follow.
        watts: Power of each GPU.
        counter: False for GPUs without an energy counter, "stuck" for one that stands still.
    """

    def __init__(
        self, time: FakeTime, watts: tuple[float, ...] = (300.0, 100.0), counter: object = True
    ) -> None:
        self.time = time
        self.watts = watts
        self.counter = counter
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        self.asked.append("init")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.watts)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        self.asked.append(uuid)
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if not self.counter:
            raise RuntimeError("Not Supported")
        steps = 0 if self.counter == "stuck" else int(self.time.now / 0.1 + 1e-6)
        return round(steps * 0.1 * self.watts[handle] * 1e3)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return round(self.watts[handle] * 1e3)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 40 + handle

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=90, memory=30)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return 4 if handle else 1
