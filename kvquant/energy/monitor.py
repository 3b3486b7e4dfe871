"""`EnergyMonitor`: measures the energy and time of a region of work with the best meter."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kvquant.energy.estimate import EstimatedMeter, open_cpu_meter
from kvquant.energy.gpus import Gpu, gpu_of, load_nvml, visible_gpus
from kvquant.energy.nvml import NvmlMeter, NvmlPowerMeter, gpu_handles
from kvquant.errors import UserError

if TYPE_CHECKING:
    import torch


class Meter(Protocol):
    """Interface of a source of energy readings."""

    source: Literal["nvml", "estimated"]

    @property
    def method(self) -> str:
        """The counter or power model behind the readings, in words."""
        ...

    def read(self) -> float:
        """Returns the joules since some fixed moment."""
        ...

    def telemetry(self) -> list[dict[str, Any]]:
        """Returns one mapping per device with its current clocks, temperature and power."""
        ...

    def close(self) -> None:
        """Releases what the meter holds."""
        ...


def _as_devices(devices: str | torch.device | Sequence[str | torch.device]) -> list[torch.device]:
    """Returns the given devices as torch devices, each once."""
    import torch

    several = [devices] if isinstance(devices, str | torch.device) else list(devices)
    return list(dict.fromkeys(torch.device(d) for d in several))


def metered_gpus(nvml: Any, devices: Sequence[torch.device]) -> list[Gpu]:
    """Returns the GPUs of the given torch devices, each board once.

    Raises:
        UserError: A device is a MIG slice, for which there is no energy counter.
        LookupError: NVML does not know a device.
    """
    found: dict[str, Gpu] = {}
    for device in devices:
        gpu = gpu_of(nvml, device)
        if gpu.mig:
            raise UserError(
                f"--device: {gpu.name} is a MIG slice, and NVML counts the energy of the whole "
                "board with all its slices: measure energy on a GPU that is not in MIG mode"
            )
        found.setdefault(gpu.uuid or str(gpu.handle), gpu)
    return list(found.values())


def open_meter(
    devices: str | torch.device | Sequence[str | torch.device],
    *,
    nvml: Any = None,
    find_uuids: Callable[[], list[str] | None] | None = None,
) -> Meter:
    """Opens the best meter for exactly the devices that a model uses.

    Args:
        devices: One or more torch devices: "cpu", "cuda" (the current one), "cuda:1".
        nvml: The pynvml module; None imports it.
        find_uuids: Returns the UUIDs of the GPUs in tests; None asks torch for them.

    Returns:
        On GPUs their energy counters, else integrated power, else an estimate whose method says
        why. On a CPU RAPL, else an estimate.

    Raises:
        UserError: A device is a MIG slice.
    """
    named = _as_devices(devices)
    on_gpu = [device for device in named if device.type == "cuda"]
    if not on_gpu:
        return open_cpu_meter()
    try:
        library = nvml if nvml is not None else load_nvml()
        if find_uuids is not None:
            handles = gpu_handles(library, find_uuids())
        else:
            handles = [gpu.handle for gpu in metered_gpus(library, on_gpu)]
        meter: NvmlMeter | NvmlPowerMeter
        try:
            meter = NvmlMeter(library, handles)
        except Exception:  # older GPUs lack counters, and shared ones hide them
            meter = NvmlPowerMeter(library, handles)
    except UserError:
        raise
    except Exception as error:
        estimate = EstimatedMeter()
        estimate.method += f" (processor only; NVML: {error})"
        return estimate
    if len(on_gpu) < len(named):
        meter.method += "; the part of the model that is on the processor is not counted"
    return meter


def not_metered(meter: Meter) -> dict[str, Any]:
    """Returns the names and watts of the visible GPUs that the meter does not count.

    They are part of the job's machine, but not of the model's energy.
    """
    indices = getattr(meter, "indices", ())
    if not indices:
        return {}
    try:
        nvml = load_nvml()
        others = [
            gpu
            for gpu in visible_gpus(nvml)
            if not gpu.mig and nvml.nvmlDeviceGetIndex(gpu.handle) not in indices
        ]
        watts = sum(nvml.nvmlDeviceGetPowerUsage(gpu.handle) for gpu in others) / 1e3
    except Exception:  # bookkeeping only
        return {}
    names = dict(Counter(gpu.name for gpu in others))
    return {"idle_gpus": {"names": names, "watts": watts}} if others else {}


@dataclass(frozen=True)
class Reading:
    """Holds the energy and time of a region of work."""

    joules: float
    seconds: float


class EnergyMonitor:
    """Measures the energy of regions of work between `start()` and `stop()`.

    If the meter averages power over the past (`window`), the monitor waits for it to settle before
    and after a region and subtracts what the idle device drew meanwhile. The result is the energy
    of the region alone, whatever ran before it.

    Args:
        meter: The source of readings.
        wait: Waits until the device is idle; called at both ends of a region.
        now: Monotonic clock in seconds, which tests replace.
        sleep: Sleeps for some seconds, which tests replace.
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
        self._idle = 0.0
        self._averaged = meter if isinstance(meter, NvmlPowerMeter) and meter.window else None

    @property
    def min_seconds(self) -> float:
        """Seconds of the shortest region that the meter can measure."""
        return float(getattr(self.meter, "min_seconds", 0.0))

    def start(self) -> None:
        """Starts a region."""
        self._wait()
        if self._averaged is not None:
            self._sleep(self._averaged.window)
        joules = self.meter.read()
        if self._averaged is not None:
            self._idle = self._averaged.power()
        self._fault()  # forget faults from before the region
        self._started = (self._now(), joules)

    @property
    def elapsed(self) -> float:
        """Seconds since `start()`."""
        return self._now() - self._started[0]

    def stop(self) -> Reading:
        """Ends the region and returns its energy and time.

        Raises:
            UserError: A part of the energy was not counted, or the reading is impossible.
        """
        self._wait()
        if self._averaged is None:
            joules = self.meter.read() - self._started[1]
            seconds = self.elapsed
        else:
            seconds = self.elapsed
            joules = self._settled(self._averaged, seconds)
        if fault := self._fault():
            raise UserError(fault)
        self._check(joules, seconds)
        return Reading(joules, seconds)

    def _fault(self) -> str | None:
        """Returns the meter's fault since the last call, or None."""
        take = getattr(self.meter, "take_fault", None)
        return take() if take is not None else None

    def _settled(self, meter: NvmlPowerMeter, seconds: float) -> float:
        """Returns the joules of the region from power that the meter averages over `window`.

        The integral from the region's start to one window after its end contains the whole region.
        It also contains idle power of half a window before the region and of the rest after it,
        which is subtracted.
        """
        self._sleep(meter.window)
        joules = meter.read() - self._started[1]
        after = self.elapsed - seconds
        before = meter.window / 2
        return joules - self._idle * before - meter.power() * (after - before)

    def _check(self, joules: float, seconds: float) -> None:
        limit = getattr(self.meter, "max_watts", None)
        steps = 10 * getattr(self.meter, "refresh", 0.0)
        if not math.isfinite(joules) or joules < 0:
            raise UserError(f"energy: {joules:g} J in {seconds:.1f} s cannot be true: run it again")
        if limit is not None and seconds >= steps and joules > limit * seconds:
            raise UserError(
                f"energy: {joules / seconds:.0f} W is more than the GPU(s) can draw (limit "
                f"{limit / 1.5:.0f} W): the reading is wrong; run the job again"
            )

    def idle_watts(self, seconds: float) -> float:
        """Returns the mean power in watts while nothing runs, or 0 if `seconds` is 0.

        The measurement takes `seconds`, or longer if the meter needs it.
        """
        if seconds <= 0:
            return 0.0
        self.start()
        self._sleep(max(seconds, 10 * getattr(self.meter, "refresh", 0.0)))
        reading = self.stop()
        return reading.joules / reading.seconds
