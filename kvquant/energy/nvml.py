"""GPU board energy from NVML: the total-energy counter, or power integrated over time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

POWER_INTERVAL = 0.05


def visible_uuids() -> list[str] | None:
    """UUIDs of the GPUs that torch sees, or None if it cannot tell.

    NVML lists every GPU of the host; on a shared host those of other jobs must not be counted.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    uuids = [str(getattr(p, "uuid", "")) for p in properties]
    return [u if u.startswith("GPU-") else f"GPU-{u}" for u in uuids] if all(uuids) else None


def gpu_handles(nvml: Any, uuids: list[str] | None) -> list[Any]:
    """NVML handles of the GPUs with these UUIDs, or of all GPUs.

    Raises:
        RuntimeError: There is no GPU.
    """
    nvml.nvmlInit()
    if uuids:
        return [nvml.nvmlDeviceGetHandleByUUID(u) for u in uuids]
    count = nvml.nvmlDeviceGetCount()
    if not count:
        raise RuntimeError("no GPU")
    return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]


def refresh_seconds(
    read: Callable[[], float],
    *,
    patience: float = 1.0,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float | None:
    """Seconds between two updates of a counter, or None if it stands still for `patience`."""
    changed: list[float] = []
    value, start = read(), now()
    while now() - start < patience:
        sleep(0.002)
        latest = read()
        if latest != value:
            changed.append(now())
            value = latest
            if len(changed) == 2:
                return changed[1] - changed[0]
    return None


class _NvmlBase:
    """Telemetry of GPUs; what a GPU does not tell is None."""

    source: Literal["nvml", "estimated"] = "nvml"
    method = ""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml = nvml
        self._handles = handles

    def _ask(self, function: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*args)
        except Exception:  # a field that this GPU or driver does not have
            return None

    def telemetry(self) -> list[dict[str, Any]]:
        """Of each GPU: clocks (MHz), temperature (C), power and limit (W), utilisation (%)."""
        rows = []
        for index, handle in enumerate(self._handles):
            power = self._ask("nvmlDeviceGetPowerUsage", handle)
            limit = self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)
            use = self._ask("nvmlDeviceGetUtilizationRates", handle)
            rows.append(
                {
                    "device": f"gpu{index}",
                    "sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", handle, 1),
                    "memory_clock_mhz": self._ask("nvmlDeviceGetClockInfo", handle, 2),
                    "temperature_c": self._ask("nvmlDeviceGetTemperature", handle, 0),
                    "power_w": None if power is None else power / 1e3,
                    "power_limit_w": None if limit is None else limit / 1e3,
                    "utilization_percent": None if use is None else use.gpu,
                    "memory_utilization_percent": None if use is None else use.memory,
                    "throttle_reasons": self._ask(
                        "nvmlDeviceGetCurrentClocksThrottleReasons", handle
                    ),
                }
            )
        return rows

    def close(self) -> None:
        """Nothing to release."""


class NvmlMeter(_NvmlBase):
    """The total-energy counter of GPU boards, in steps of its refresh time.

    Args:
        nvml: The pynvml module.
        handles: NVML handles of the GPUs.
        now: Seconds; for tests.
        sleep: For tests.

    Raises:
        RuntimeError: A counter stands still.
    """

    def __init__(
        self,
        nvml: Any,
        handles: list[Any],
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(nvml, handles)
        periods = []
        for handle in handles:
            period = refresh_seconds(partial(self._joules, handle), now=now, sleep=sleep)
            if period is None:
                raise RuntimeError("the energy counter stands still")
            periods.append(period)
        self.method = (
            f"GPU board energy, NVML total energy counter of {len(handles)} GPU(s), "
            f"refreshed every {max(periods) * 1e3:.0f} ms"
        )

    def _joules(self, handle: Any) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    def read(self) -> float:
        """Joules since the driver was loaded, all GPUs."""
        return sum(self._joules(h) for h in self._handles)


class NvmlPowerMeter(_NvmlBase):
    """Board power, sampled by a thread and integrated by the trapezoid rule.

    Args:
        nvml: The pynvml module.
        handles: NVML handles of the GPUs.
        interval: Seconds between samples; 0 samples only when read (for tests).
        now: Seconds; for tests.
    """

    def __init__(
        self,
        nvml: Any,
        handles: list[Any],
        *,
        interval: float = POWER_INTERVAL,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(nvml, handles)
        self._now = now
        self._lock = threading.Lock()
        self._total = 0.0
        self._last = (now(), self._watts())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if interval:
            self._thread = threading.Thread(target=self._loop, args=(interval,), daemon=True)
            self._thread.start()
        self.method = (
            f"GPU board energy, NVML power of {len(handles)} GPU(s) integrated every "
            f"{interval * 1e3:.0f} ms, as no energy counter could be used"
        )

    def _watts(self) -> float:
        return sum(self._nvml.nvmlDeviceGetPowerUsage(h) for h in self._handles) / 1e3

    def _loop(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.read()

    def read(self) -> float:
        """Joules since the meter was opened, all GPUs."""
        with self._lock:
            moment, watts = self._now(), self._watts()
            before, earlier = self._last
            self._total += (moment - before) * (watts + earlier) / 2
            self._last = (moment, watts)
            return self._total

    def close(self) -> None:
        """Ends the sampling thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
