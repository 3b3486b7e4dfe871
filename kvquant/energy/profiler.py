"""`DetailedEnergyProfiler`: samples power, clocks, temperature and utilization into a CSV."""

from __future__ import annotations

import csv
import itertools
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvquant.energy.carbon import CarbonTracker
from kvquant.energy.monitor import Meter
from kvquant.formats.files import replacing


def counter_over_power(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the energy by the counter over the integral of the sampled power.

    Args:
        samples: Samples of :class:`DetailedEnergyProfiler`, one per moment and device.

    Returns:
        About 1 if both agree; None without two moments that have a power of each device.
    """
    moments: dict[float, tuple[float, float]] = {}
    for sample in samples:
        power = sample.get("power_w")
        if power is None:
            return None
        watts = moments.get(sample["seconds"], (0.0, 0.0))[1] + power
        moments[sample["seconds"]] = (sample["joules"], watts)
    points = sorted((at, *both) for at, both in moments.items())
    integral = sum((b[0] - a[0]) * (a[2] + b[2]) / 2 for a, b in itertools.pairwise(points))
    return (points[-1][1] - points[0][1]) / integral if integral > 0 else None


class DetailedEnergyProfiler:
    """Samples a meter while a `with` block runs.

    Args:
        meter: The source of readings.
        interval: Seconds between samples.
        country: ISO 3166 code for CodeCarbon in offline mode; None leaves CodeCarbon out.

    Attributes:
        label: Written into every sample; set it to the name of what runs now.
        samples: One mapping per sample and device, with `seconds` and `joules` since the start.
        errors: Number of failed readings, after which sampling continued.
        last_error: Message of the last failed reading.
        carbon: CodeCarbon's report, with `error` if it failed.
    """

    def __init__(self, meter: Meter, *, interval: float = 0.5, country: str | None = None) -> None:
        self._meter = meter
        self._interval = interval
        gpus = getattr(meter, "indices", ())
        self._tracker = CarbonTracker(country, gpus) if country else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.errors = 0
        self.last_error = ""
        self.label = ""
        self.samples: list[dict[str, Any]] = []
        self.carbon: dict[str, Any] = {}

    def _sample(self, start: float, first: float) -> None:
        joules = self._meter.read()
        now = {
            "seconds": round(time.monotonic() - start, 3),
            "label": self.label,
            "joules": round(joules - first, 3),
        }
        self.samples += [now | row for row in self._meter.telemetry()]

    def _loop(self) -> None:
        start = time.monotonic()
        first: float | None = None
        while True:
            try:
                first = self._meter.read() if first is None else first
                self._sample(start, first)
            except Exception as error:  # sampling continues after any error, which is counted
                self.errors += 1
                self.last_error = (str(error).splitlines() or [type(error).__name__])[0]
            if self._stop.wait(self._interval):
                return

    def __enter__(self) -> DetailedEnergyProfiler:
        if self._tracker is not None:
            self._tracker.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._tracker is not None:
            self.carbon = self._tracker.stop()

    def summary(self) -> dict[str, Any]:
        """Returns minimum, median and maximum of each numeric field over all devices."""
        found: dict[str, Any] = {"samples": len(self.samples)}
        if self.errors:
            found |= {"errors": self.errors, "last_error": self.last_error}
        for field in self.samples[0] if self.samples else []:
            values = [s[field] for s in self.samples if isinstance(s[field], int | float)]
            if values and field not in ("seconds", "joules", "throttle_reasons"):
                found[field] = {
                    "min": min(values),
                    "median": statistics.median(values),
                    "max": max(values),
                }
        reasons = [s.get("throttle_reasons") for s in self.samples]
        known = [r for r in reasons if r is not None]
        if known:  # a bit mask of all reasons that were seen
            found["throttle_reasons"] = 0
            for mask in known:
                found["throttle_reasons"] |= int(mask)
        return found

    def write_csv(self, path: Path) -> None:
        """Writes the samples as CSV atomically, or nothing if there are none."""
        if not self.samples:
            return
        with (
            replacing(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, fieldnames=list(self.samples[0]))
            writer.writeheader()
            writer.writerows(self.samples)
