"""GPU board energy from NVML: the total-energy counter, or power integrated over time.

A query of NVML may fail at any time and a counter may start again with the driver. A failed query
is repeated, and counted; what cannot be bridged ends the measurement by name, never in a number.
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
MAX_GAP = 1.0  # seconds without a reading that are bridged by interpolation
AVERAGED = 1.0  # seconds that nvmlDeviceGetPowerUsage averages over, on Ampere and newer
POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT: power now, milliwatts
MIN_TRIAL = 5.0  # seconds of a trial against a counter of 100 ms
_TRIES = 3
_NOT_MEASURED = "the energy of this job cannot be measured"


def gpu_handles(nvml: Any, uuids: Sequence[str] | None) -> list[Any]:
    """NVML handles of the GPUs with these UUIDs, or of all that CUDA will see.

    Raises:
        LookupError: There is no GPU, or none with such a UUID.
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
    """Telemetry of GPUs; what a GPU does not tell is None.

    Attributes:
        refresh: Seconds between two values of the source.
        window: Seconds of the past that a reading of power is averaged over.
        min_seconds: Shortest trial that it can measure.
        max_watts: Power that the boards cannot draw; None where no limit is known.
        indices: NVML's numbers of the boards, which CodeCarbon uses; None if not known.
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
        """Watts that a board cannot draw: half above the highest limit it can be set to."""
        bounds = self._ask("nvmlDeviceGetPowerManagementLimitConstraints", handle)
        highest = bounds[1] if bounds else self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)
        return 1.5 * highest / 1e3 if highest else None

    def _failed(self, error: Exception) -> None:
        self._errors += 1
        self._last_error = (str(error).splitlines() or [type(error).__name__])[0]

    def _instant(self, handle: Any) -> float:
        """Watts at this moment; raises where NVML does not tell them."""
        field = self._nvml.nvmlDeviceGetFieldValues(handle, [POWER_INSTANT])[0]
        if status := getattr(field, "nvmlReturn", 0):
            raise RuntimeError(f"NVML: error {status} for the field of instantaneous power")
        return float(field.value.uiVal) / 1e3

    def _power(self, handle: Any, instant: bool) -> float:
        """Watts, at this moment or as the driver averages them."""
        if instant:
            return self._instant(handle)
        return float(self._nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3

    def _tells_instant(self, handle: Any) -> bool:
        for _ in range(_TRIES):
            try:
                return self._instant(handle) > 0
            except Exception:  # older drivers and GPUs do not know the field
                continue
        return False

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

    def quality(self) -> dict[str, Any]:
        """What the record says: errors that were survived, and processes on the busiest GPU.

        More processes than this one share a board, and its energy.
        """
        found: dict[str, Any] = {"errors": self._errors}
        running = [self._ask("nvmlDeviceGetComputeRunningProcesses", h) for h in self._handles]
        if None not in running:
            found["processes"] = max(map(len, running))
        return found | ({"last_error": self._last_error} if self._last_error else {})

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
        self._last = [self._joules(handle) for handle in self._handles]
        self.refresh = max(periods)
        self.min_seconds = max(MIN_TRIAL, 50 * self.refresh)  # a step more or less is 2 %
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
        """Joules since the driver was loaded, all GPUs.

        Raises:
            UserError: A counter cannot be read, or is lower than before.
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
                self._last[index] = value
            return sum(self._last)


class NvmlPowerMeter(_NvmlBase):
    """Board power, sampled by a thread and integrated by the trapezoid rule.

    Power of this moment is read where NVML tells it. Else it is an average over the last second,
    and `window` says so: whoever measures a stretch must let it settle (`EnergyMonitor` does).
    A failed or impossible reading is counted and left out; the trapezoid bridges it up to
    `MAX_GAP` seconds.

    Args:
        nvml: The pynvml module.
        handles: NVML handles of the GPUs.
        interval: Seconds between samples; 0 samples only when read (for tests).
        now: Seconds; for tests.
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
        self._good = self._last[0]  # of the last true sample
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
        """Watts of all GPUs; raises for a reading that cannot be true."""
        total = 0.0
        for index, handle in enumerate(self._handles):
            watts = self._power(handle, self._use_instant)
            limit = self._limits[index]
            if not 0 <= watts < (math.inf if limit is None else limit):
                raise RuntimeError(f"NVML told {watts:g} W, which this GPU cannot draw")
            use = self._ask("nvmlDeviceGetUtilizationRates", handle) if watts == 0 else None
            if use is not None and use.gpu:
                raise RuntimeError("NVML told 0 W of a GPU that works")
            total += watts
        return total

    def _loop(self, interval: float) -> None:
        while not self._stop.wait(interval):
            with self._lock:
                self._sample()

    def _sample(self) -> bool:
        """Takes a sample, or counts an error."""
        try:
            watts, moment = self._watts(), self._now()
        except Exception as error:  # whatever it is: the thread goes on, and the error is counted
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
        """Joules since the meter was opened, all GPUs.

        Raises:
            UserError: There has been no reading for longer than can be interpolated.
        """
        with self._lock:
            if not any(self._sample() for _ in range(_TRIES)):
                moment = self._now()
                if moment - self._good > MAX_GAP:
                    raise UserError(self._gap(moment - self._good))
                self._advance(moment, self._last[1])
            return self._total

    def power(self) -> float:
        """Watts of the last sample."""
        with self._lock:
            return self._last[1]

    def take_fault(self) -> str | None:
        """Why joules since the last call are not true, or None."""
        with self._lock:
            fault, self._fault = self._fault, None
            return fault

    def quality(self) -> dict[str, Any]:
        """Samples, errors, and gaps that were interpolated."""
        gaps = {"gaps": self._gaps, "longest_gap_s": round(self._longest, 3)}
        return {"samples": self._samples, **super().quality(), **gaps}

    def close(self) -> None:
        """Ends the sampling thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
