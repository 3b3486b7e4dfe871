"""`EnergyMonitor`: joules and seconds of a stretch of work, from the best meter there is."""

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
    """A source of energy readings."""

    source: Literal["nvml", "estimated"]

    @property
    def method(self) -> str:
        """Which counter or model of power gives the numbers."""
        ...

    def read(self) -> float:
        """Joules since some fixed moment."""
        ...

    def telemetry(self) -> list[dict[str, Any]]:
        """One mapping a device: clocks, temperature, power, whatever the source knows now."""
        ...

    def close(self) -> None:
        """Releases what the meter holds."""
        ...


def _as_devices(devices: str | torch.device | Sequence[str | torch.device]) -> list[torch.device]:
    """Devices as torch names them, each once."""
    import torch

    several = [devices] if isinstance(devices, str | torch.device) else list(devices)
    return list(dict.fromkeys(torch.device(d) for d in several))


def metered_gpus(nvml: Any, devices: Sequence[torch.device]) -> list[Gpu]:
    """The GPUs behind devices of torch, each board once.

    Raises:
        UserError: One is a MIG slice, whose energy nothing counts.
        LookupError: NVML does not know one.
    """
    found: dict[str, Gpu] = {}
    for device in devices:
        gpu = gpu_of(nvml, device)
        if gpu.mig:
            raise UserError(
                f"--device: {gpu.name} is a MIG slice, and NVML counts the energy of the whole "
                "board with all its slices: measure energy on a GPU that is not cut into slices"
            )
        found.setdefault(gpu.uuid or str(gpu.handle), gpu)
    return list(found.values())


def open_meter(
    devices: str | torch.device | Sequence[str | torch.device],
    *,
    nvml: Any = None,
    find_uuids: Callable[[], list[str] | None] | None = None,
) -> Meter:
    """The best meter for the devices that a model is on, and for no other.

    Args:
        devices: Device or devices, as torch names them: "cpu", "cuda" (the current one), "cuda:1".
        nvml: The pynvml module; None imports it.
        find_uuids: UUIDs of those GPUs; None asks torch for them, for tests.

    Returns:
        For GPUs their energy counters, else integrated power, else an estimate whose method says
        why; for a CPU RAPL, else an estimate.

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
        except Exception:  # counters are missing on older GPUs and hidden on shared ones
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
    """The GPUs that this process may use and does not: how many of which name, and their watts.

    They belong to the job's machine and not to the model's energy.
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
    """Energy of a stretch of work."""

    joules: float
    seconds: float


class EnergyMonitor:
    """Measures stretches of work between `start()` and `stop()`.

    A meter whose power is an average over the past (`window`) is let settle before and after a
    stretch, and what the idle device drew in that time is taken off: so a stretch has its own
    joules alone, whatever ran before it.

    Args:
        meter: Where readings come from.
        wait: Waits until the device has nothing left to do; called at both ends.
        now: Seconds of a clock that nobody sets; for tests.
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
        self._idle = 0.0
        self._averaged = meter if isinstance(meter, NvmlPowerMeter) and meter.window else None

    @property
    def min_seconds(self) -> float:
        """The shortest stretch that the meter can measure."""
        return float(getattr(self.meter, "min_seconds", 0.0))

    def start(self) -> None:
        """Begins a stretch."""
        self._wait()
        if self._averaged is not None:
            self._sleep(self._averaged.window)
        joules = self.meter.read()
        if self._averaged is not None:
            self._idle = self._averaged.power()
        self._fault()  # of the time before
        self._started = (self._now(), joules)

    @property
    def elapsed(self) -> float:
        """Seconds since `start()`."""
        return self._now() - self._started[0]

    def stop(self) -> Reading:
        """Ends the stretch.

        Raises:
            UserError: Energy was not counted for a part of it, or cannot be true.
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
        """What the meter lost since it was last asked."""
        take = getattr(self.meter, "take_fault", None)
        return take() if take is not None else None

    def _settled(self, meter: NvmlPowerMeter, seconds: float) -> float:
        """Joules of the stretch from power that is averaged over `window`.

        Half a window of what was idle before it and the rest of what is idle after it lie in the
        integral from its start to a window after its end, and nothing of it lies outside.
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
            raise UserError(f"energy: {joules:g} J in {seconds:.1f} s cannot be; run the job again")
        if limit is not None and seconds >= steps and joules > limit * seconds:
            raise UserError(
                f"energy: {joules / seconds:.0f} W is more than the GPU(s) can draw (limit "
                f"{limit / 1.5:.0f} W): the reading is wrong; run the job again"
            )

    def idle_watts(self, seconds: float) -> float:
        """Mean power while nothing runs, over `seconds` or as long as the meter needs.

        0 if `seconds` is 0.
        """
        if seconds <= 0:
            return 0.0
        self.start()
        self._sleep(max(seconds, 10 * getattr(self.meter, "refresh", 0.0)))
        reading = self.stop()
        return reading.joules / reading.seconds
