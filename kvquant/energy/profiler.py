"""`DetailedEnergyProfiler`: a CSV of power and clocks, and the bookkeeping of CodeCarbon."""

from __future__ import annotations

import csv
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from kvquant.energy.monitor import Meter


class DetailedEnergyProfiler:
    """Samples a meter while a `with` block runs.

    Args:
        meter: Where readings come from.
        interval: Seconds between samples.
        csv_path: If given, all samples are written there at the end.
        country: ISO code for CodeCarbon in offline mode; None leaves CodeCarbon out.

    Attributes:
        samples: One mapping a sample, with `seconds` and `joules` since the start.
        carbon: What CodeCarbon reported, or why it did not.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        interval: float = 0.5,
        csv_path: Path | None = None,
        country: str | None = None,
    ) -> None:
        self._meter = meter
        self._interval = interval
        self._csv = csv_path
        self._country = country
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._tracker: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.samples: list[dict[str, Any]] = []
        self.carbon: dict[str, Any] = {}

    def _loop(self) -> None:
        start, first = time.monotonic(), self._meter.read()
        while True:
            self.samples.append(
                {
                    "seconds": round(time.monotonic() - start, 3),
                    "joules": round(self._meter.read() - first, 3),
                    **self._meter.telemetry(),
                }
            )
            if self._stop.wait(self._interval):
                return

    def __enter__(self) -> DetailedEnergyProfiler:
        if self._country:
            try:
                from codecarbon import OfflineEmissionsTracker

                self._folder = tempfile.TemporaryDirectory(prefix="kvquant-carbon-")
                self._tracker = OfflineEmissionsTracker(
                    country_iso_code=self._country,
                    save_to_file=False,
                    output_dir=self._folder.name,
                    log_level="critical",
                )
                self._tracker.start()
            except Exception as error:  # bookkeeping only: never the reason to lose a measurement
                self.carbon = {"error": str(error).splitlines()[0]}
                self._tracker = None
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
            kg = self._tracker.stop()
            data = self._tracker.final_emissions_data
            self.carbon = {
                "tool": "codecarbon, offline",
                "country": self._country,
                "kg_co2eq": kg,
                "kwh": data.energy_consumed,
            }
        if self._folder is not None:
            self._folder.cleanup()
        if self._csv is not None and self.samples:
            self._csv.parent.mkdir(parents=True, exist_ok=True)
            with open(self._csv, "w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, fieldnames=list(self.samples[0]))
                writer.writeheader()
                writer.writerows(self.samples)
