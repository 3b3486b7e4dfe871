"""Sampling during a region, and carbon bookkeeping.

Also covers: energy.carbon.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvquant.energy.carbon import CarbonTracker
from kvquant.energy.profiler import DetailedEnergyProfiler


class FakeMeter:
    """A meter that gains a joule at each reading and heats up."""

    source = "estimated"
    method = "fake"

    def __init__(self) -> None:
        self.joules = 0.0

    def read(self) -> float:
        self.joules += 1
        return self.joules

    def telemetry(self) -> list[dict[str, Any]]:
        hot = 40 + self.joules
        return [
            {"device": f"gpu{i}", "temperature_c": hot, "fan": None, "throttle_reasons": 1 << i}
            for i in range(2)
        ]

    def close(self) -> None:
        pass


def test_samples_go_to_csv(tmp_path: Path) -> None:
    with DetailedEnergyProfiler(FakeMeter(), interval=0.005) as profiler:  # type: ignore[arg-type]
        profiler.label = "fp16"
        while len(profiler.samples) < 6:
            pass
    assert profiler.carbon == {}
    path = tmp_path / "deep/rep0.csv"
    profiler.write_csv(path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == len(profiler.samples)
    assert rows[0]["joules"] == "1.0"
    assert rows[-1]["label"] == "fp16"
    assert {r["device"] for r in rows} == {"gpu0", "gpu1"}
    assert [p.name for p in path.parent.iterdir()] == ["rep0.csv"]
    found = profiler.summary()
    heat = found["temperature_c"]
    assert heat["min"] < heat["median"] < heat["max"]
    assert found["samples"] == len(rows)
    assert found["throttle_reasons"] == 3  # every reason that was seen
    assert "fan" not in found


def test_nothing_sampled_nothing_written(tmp_path: Path) -> None:
    profiler = DetailedEnergyProfiler(FakeMeter())  # type: ignore[arg-type]
    profiler.write_csv(tmp_path / "x.csv")
    assert profiler.summary() == {"samples": 0}
    assert not list(tmp_path.iterdir())


def test_carbon_is_counted_offline_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    tracker = CarbonTracker("POL")
    tracker.start()
    found = tracker.stop()
    assert "error" not in found
    assert found["kg_co2eq"] >= 0
    assert found["kwh"] >= 0
    assert os.listdir(tmp_path) == []
    printed = capfd.readouterr()
    assert "INFO" not in printed.out + printed.err


def test_an_unknown_country_is_told() -> None:
    pytest.importorskip("codecarbon")
    tracker = CarbonTracker("XYZ")
    tracker.start()
    found = tracker.stop()
    assert found["error"].startswith("CodeCarbon knows no country 'XYZ'")
    assert "kg_co2eq" not in found


def test_a_failing_tracker_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swallowed:
        """CodeCarbon after a failure that it swallowed: no attribute is there."""

        def start(self) -> None:
            pass

        def stop(self) -> None:
            return None

    monkeypatch.setattr(CarbonTracker, "_open", lambda self: Swallowed())
    with DetailedEnergyProfiler(FakeMeter(), country="POL") as profiler:  # type: ignore[arg-type]
        pass
    assert "final_emissions_data" in profiler.carbon["error"]
    assert profiler.samples


@pytest.mark.fault(
    "devices",
    "CodeCarbon counts other GPUs",
    "stated in the record as an error",
)
@pytest.mark.parametrize(
    ("counted", "error"), [([1], None), (None, "counts other GPUs"), ([0, 1], "counts other GPUs")]
)
def test_carbon_is_of_the_same_gpus(
    monkeypatch: pytest.MonkeyPatch, counted: list[int] | None, error: str | None
) -> None:
    """By NVML's number: CodeCarbon 3.3 cuts the G off a UUID and then finds no GPU."""
    codecarbon = pytest.importorskip("codecarbon")
    asked: list[Any] = []

    class Tracker:
        final_emissions_data = SimpleNamespace(energy_consumed=0.5, duration=2.0)

        def __init__(self, **options: Any) -> None:
            asked.append(options["gpu_ids"])
            self._hardware = [object(), SimpleNamespace(gpu_ids=counted)]

        def start(self) -> None: ...

        def stop(self) -> float:
            return 0.1

    class Meter(FakeMeter):
        indices = [1]  # noqa: RUF012

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", Tracker)
    with DetailedEnergyProfiler(Meter(), country="POL") as profiler:  # type: ignore[arg-type]
        pass
    assert asked == [[1]]
    assert profiler.carbon["gpus"] == 1
    if error is None:
        assert profiler.carbon["kwh"] == 0.5
    else:
        assert error in profiler.carbon["error"]
        assert "kwh" not in profiler.carbon
