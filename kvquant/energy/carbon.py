"""Carbon bookkeeping with CodeCarbon in offline mode, whose failure never fails a job."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

from kvquant.energy.carbon_intensity import knows, refusal


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class CarbonTracker:
    """Tracks emissions between `start()` and `stop()`.

    CodeCarbon swallows its own failures and uses the world's average for an unknown country. Both
    are reported here as an error instead.

    Args:
        country: ISO 3166 code of three letters.
        gpus: NVML indices of the GPUs to count, none for work on a CPU. They are indices because
            CodeCarbon 3.3 finds no GPU by a UUID that begins with "GPU-".
    """

    def __init__(self, country: str, gpus: Sequence[int] | None = ()) -> None:
        self._country = country
        self._gpus = gpus
        self._tracker: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._error: str | None = None

    def start(self) -> None:
        """Starts tracking; `stop()` reports a failure."""
        try:
            self._tracker = self._open()
            self._check_gpus()
            self._tracker.start()
        except Exception as error:
            self._error, self._tracker = _first_line(error), None

    def _open(self) -> Any:
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        if self._gpus is None:
            raise ValueError("NVML gives no index of the GPUs, which CodeCarbon needs")
        if not knows(self._country):
            raise ValueError(refusal(self._country))
        self._folder = tempfile.TemporaryDirectory(prefix="kvquant-carbon-")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # save_to_*: no other way in 3.0
            return OfflineEmissionsTracker(
                country_iso_code=self._country,
                gpu_ids=list(self._gpus),
                output_dir=self._folder.name,
                save_to_file=False,
                save_to_api=False,
                allow_multiple_runs=True,
                log_level="critical",
            )

    def _check_gpus(self) -> None:
        """Refuses a tracker that counts other GPUs than the job's."""
        for hardware in getattr(self._tracker, "_hardware", []):
            counted = getattr(hardware, "gpu_ids", ())
            if counted is None or {int(i) for i in counted} - set(self._gpus or ()):
                raise ValueError("CodeCarbon counts other GPUs than those of this job")

    def stop(self) -> dict[str, Any]:
        """Stops tracking and returns what CodeCarbon counted, with `error` if it failed."""
        found: dict[str, Any] = {"tool": "codecarbon, offline", "country": self._country}
        if self._gpus:
            found["gpus"] = len(self._gpus)
        try:
            if self._tracker is not None:
                kg = self._tracker.stop()
                data = self._tracker.final_emissions_data
                found |= {"kg_co2eq": kg, "kwh": data.energy_consumed, "seconds": data.duration}
        except Exception as error:
            self._error = _first_line(error)
        finally:
            if self._folder is not None:
                self._folder.cleanup()
        return found | {"error": self._error} if self._error else found
