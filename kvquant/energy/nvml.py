"""GPU board energy from NVML: the total-energy counter, or power integrated over time.

A query of NVML may fail at any time, and a counter restarts with the driver. A failed query is
counted and repeated. A fault that cannot be bridged ends the measurement with an error and never
with a number.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from kvquant.energy.gpus import by_uuid, visible_gpus
from kvquant.errors import UserError

POWER_INTERVAL = 0.05
MAX_GAP = 1.0  # seconds without a reading that interpolation may bridge
AVERAGED = 1.0  # seconds that nvmlDeviceGetPowerUsage averages over, on Ampere and newer
POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT: current power, milliwatts
MIN_TRIAL = 5.0  # seconds, as the counter is refreshed every 100 ms
_TRIES = 3
_NOT_MEASURED = "the energy of this job cannot be measured"


def gpu_handles(nvml: Any, uuids: Sequence[str] | None) -> list[Any]:
    """Returns the NVML handles of the GPUs with these UUIDs, or of all that CUDA will see.

    Raises:
        LookupError: There is no GPU, or none with one of the UUIDs.
    """
    nvml.nvmlInit()
    found = visible_gpus(nvml) if uuids is None else [by_uuid(nvml, uuid) for uuid in uuids]
    if not found:
        raise LookupError("no GPU")
    return [gpu.handle for gpu in found]


def refresh_seconds(
    read: Callable[[], float],
    *,
    patience: float = 1.0,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float | None:
    """Returns the seconds between updates of a counter, or None if it is stuck for `patience`."""
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
    """Reads telemetry of GPUs, with None for a field that a GPU does not report.

    Attributes:
        refresh: Seconds between two values of the source.
        window: Seconds that a reading of power is averaged over; 0 for instantaneous power.
        min_seconds: Seconds of the shortest trial that can be measured.
        max_watts: Power that the boards together cannot reach; None if no limit is known.
        indices: NVML indices of the boards, which CodeCarbon uses; None if not known.
    """

    source: Literal["nvml", "estimated"] = "nvml"
    method = ""
    refresh = POWER_INTERVAL
    window = 0.0
    min_seconds = MIN_TRIAL

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml = nvml
        self._handles = list(handles)
        self._lock = threading.Lock()
        self._errors = 0
        self._last_error = ""
        limits = [self._limit(handle) for handle in self._handles]
        self._limits = limits
        self.max_watts = None if None in limits else sum(w for w in limits if w is not None)
        numbers = [self._ask("nvmlDeviceGetIndex", handle) for handle in self._handles]
        self.indices: list[int] | None = None if None in numbers else numbers

    def _ask(self, function: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*args)
        except Exception:  # a field that this GPU or driver does not have
            return None

    def _limit(self, handle: Any) -> float | None:
        """Returns watts that a board cannot reach: 1.5 times its highest possible power limit."""
        bounds = self._ask("nvmlDeviceGetPowerManagementLimitConstraints", handle)
        highest = bounds[1] if bounds else self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)
        return 1.5 * highest / 1e3 if highest else None

    def _failed(self, error: Exception) -> None:
        self._errors += 1
        self._last_error = (str(error).splitlines() or [type(error).__name__])[0]

    def _instant(self, handle: Any) -> float:
        """Returns the instantaneous power in watts; raises if NVML does not report it."""
        field = self._nvml.nvmlDeviceGetFieldValues(handle, [POWER_INSTANT])[0]
        if status := getattr(field, "nvmlReturn", 0):
            raise RuntimeError(f"NVML: error {status} for the field of instantaneous power")
        return float(field.value.uiVal) / 1e3

    def _power(self, handle: Any, instant: bool) -> float:
        """Returns the power in watts, instantaneous or averaged by the driver."""
        if instant:
            return self._instant(handle)
        return float(self._nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3

    def _tells_instant(self, handle: Any) -> bool:
        for _ in range(_TRIES):
            try:
                return self._instant(handle) > 0
            except Exception:  # older drivers and GPUs lack the field
                continue
        return False

    def telemetry(self) -> list[dict[str, Any]]:
        """Returns clocks (MHz), temperature (C), power (W) and utilization (%) of each GPU."""
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

    def quality(self) -> dict[str, Any]:
        """Returns the failed queries and the number of processes on the busiest GPU.

        More than one process means that the energy of a board is shared.
        """
        found: dict[str, Any] = {"errors": self._errors}
        running = [self._ask("nvmlDeviceGetComputeRunningProcesses", h) for h in self._handles]
        if None not in running:
            found["processes"] = max(map(len, running))
        return found | ({"last_error": self._last_error} if self._last_error else {})

    def close(self) -> None:
        """Does nothing, as the meter holds nothing."""


class NvmlMeter(_NvmlBase):
    """Reads the total-energy counters of GPU boards.

    Args:
        nvml: The pynvml module.
        handles: NVML handles of the GPUs.
        now: Clock in seconds, which tests replace.
        sleep: Sleeps for some seconds, which tests replace.

    Raises:
        RuntimeError: A counter does not advance.
    """

    def __init__(
        self,
        nvml: Any,
        handles: Sequence[Any],
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(nvml, handles)
        periods = []
        for handle in self._handles:
            period = refresh_seconds(partial(self._joules, handle), now=now, sleep=sleep)
            if period is None:
                raise RuntimeError("the energy counter stands still")
            periods.append(period)
        self._now = now
        self._last = [self._joules(handle) for handle in self._handles]
        self._moved = [now()] * len(self._last)  # moments at which a counter was seen to advance
        self.refresh = max(periods)
        self.min_seconds = max(MIN_TRIAL, 50 * self.refresh)  # one refresh is at most 2 %
        self.method = (
            f"GPU board energy, NVML total energy counter of {len(self._handles)} GPU(s), "
            f"refreshed every {max(periods) * 1e3:.0f} ms"
        )

    def _joules(self, handle: Any) -> float:
        for attempt in range(_TRIES):
            try:
                return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
            except Exception as error:
                self._failed(error)
                if attempt == _TRIES - 1:
                    raise
        raise AssertionError

    def read(self) -> float:
        """Returns the joules of all GPUs since the driver was loaded.

        Raises:
            UserError: A counter cannot be read, has decreased or stands still.
        """
        with self._lock:
            for index, handle in enumerate(self._handles):
                try:
                    value = self._joules(handle)
                except Exception:
                    raise UserError(
                        f"NVML's energy counter of GPU {index} cannot be read "
                        f"({self._last_error}): {_NOT_MEASURED}; run it again"
                    ) from None
                if not self._last[index] <= value < math.inf:
                    raise UserError(
                        f"NVML's energy counter of GPU {index} went from {self._last[index]:.0f} "
                        f"to {value:.0f} J: the driver was loaded again or the counter reset; "
                        f"{_NOT_MEASURED}; run it again"
                    )
                self._check_moved(index, value)
                self._last[index] = value
            return sum(self._last)

    def _check_moved(self, index: int, value: float) -> None:
        """Refuses a counter that has stopped, as a GPU always draws power.

        Raises:
            UserError: It stands still.
        """
        moment = self._now()
        still = moment - self._moved[index]
        if value > self._last[index]:
            self._moved[index] = moment
        elif still > max(MAX_GAP, 10 * self.refresh):
            raise UserError(
                f"NVML's energy counter of GPU {index} stands still at {value:.0f} J for "
                f"{still:.1f} s: {_NOT_MEASURED}; run it again"
            )


class NvmlPowerMeter(_NvmlBase):
    """Samples board power in a thread and integrates it by the trapezoid rule.

    Instantaneous power is read if NVML reports it. Otherwise a reading is an average over the last
    second, which `window` states and `EnergyMonitor` accounts for. A failed or impossible reading
    is counted and left out, and the trapezoid rule bridges gaps of up to `MAX_GAP` seconds.

    Args:
        nvml: The pynvml module.
        handles: NVML handles of the GPUs.
        interval: Seconds between samples; 0 samples only when the meter is read, for tests.
        now: Clock in seconds, which tests replace.
    """

    def __init__(
        self,
        nvml: Any,
        handles: Sequence[Any],
        *,
        interval: float = POWER_INTERVAL,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(nvml, handles)
        self._now = now
        self._interval = interval
        instant = all(self._tells_instant(handle) for handle in self._handles)
        self._use_instant = instant
        self.window = 0.0 if instant else AVERAGED
        self._total = 0.0
        self._samples = self._gaps = 0
        self._longest = 0.0
        self._fault: str | None = None
        self._last = (now(), self._first())
        self._good = self._last[0]  # moment of the last valid sample
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if interval:
            self._thread = threading.Thread(target=self._loop, args=(interval,), daemon=True)
            self._thread.start()
        settled = "" if instant else " (an average over a second, settled around trials)"
        self.method = (
            f"GPU board energy, NVML power of {len(self._handles)} GPU(s) integrated every "
            f"{interval * 1e3:.0f} ms{settled}, as no energy counter could be used"
        )

    def _first(self) -> float:
        for _ in range(_TRIES - 1):
            try:
                return self._watts()
            except Exception as error:
                self._failed(error)
        return self._watts()

    def _watts(self) -> float:
        """Returns the power of all GPUs in watts; raises for an impossible reading."""
        total = 0.0
        for index, handle in enumerate(self._handles):
            watts = self._power(handle, self._use_instant)
            limit = self._limits[index]
            if not 0 <= watts < (math.inf if limit is None else limit):
                raise RuntimeError(f"NVML reported {watts:g} W, which this GPU cannot draw")
            # Some boards tell 0 W while they sleep, and others instead of "not supported".
            if watts == 0:
                use = self._ask("nvmlDeviceGetUtilizationRates", handle)
                if use is None:
                    raise RuntimeError("NVML reported 0 W and not whether the GPU is busy")
                if use.gpu:
                    raise RuntimeError("NVML reported 0 W for a busy GPU")
            total += watts
        return total

    def _loop(self, interval: float) -> None:
        while not self._stop.wait(interval):
            with self._lock:
                self._sample()

    def _sample(self) -> bool:
        """Takes a sample and returns True, or counts an error and returns False."""
        try:
            watts, moment = self._watts(), self._now()
        except Exception as error:  # the thread continues after any error, which is counted
            self._failed(error)
            return False
        elapsed = moment - self._good
        self._advance(moment, watts)
        self._good = moment
        self._samples += 1
        if self._interval and elapsed > 4 * self._interval:
            self._gaps += 1
            self._longest = max(self._longest, elapsed)
            if elapsed > MAX_GAP:
                self._fault = self._gap(elapsed)
        return True

    def _advance(self, moment: float, watts: float) -> None:
        before, earlier = self._last
        self._total += (moment - before) * (watts + earlier) / 2
        self._last = (moment, watts)

    def _gap(self, seconds: float) -> str:
        why = f" ({self._last_error})" if self._last_error else ""
        return (
            f"NVML gave no power for {seconds:.1f} s{why}, more than the {MAX_GAP:g} s that can be "
            f"interpolated: {_NOT_MEASURED}; run it again"
        )

    def read(self) -> float:
        """Returns the joules of all GPUs since the meter was opened.

        Raises:
            UserError: Readings failed for longer than `MAX_GAP`.
        """
        with self._lock:
            if not any(self._sample() for _ in range(_TRIES)):
                moment = self._now()
                if moment - self._good > MAX_GAP:
                    raise UserError(self._gap(moment - self._good))
                self._advance(moment, self._last[1])
            return self._total

    def power(self) -> float:
        """Returns the power of the last sample in watts."""
        with self._lock:
            return self._last[1]

    def take_fault(self) -> str | None:
        """Returns why the energy since the last call is invalid, or None."""
        with self._lock:
            fault, self._fault = self._fault, None
            return fault

    def quality(self) -> dict[str, Any]:
        """Returns the number of samples, failed queries and interpolated gaps."""
        gaps = {"gaps": self._gaps, "longest_gap_s": round(self._longest, 3)}
        return {"samples": self._samples, **super().quality(), **gaps}

    def close(self) -> None:
        """Ends the sampling thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
