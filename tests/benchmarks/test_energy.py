"""`kvquant energy` on a tiny model."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvquant.benchmarks.energy import Trial, run_trial, side
from kvquant.benchmarks.workload import Prepared
from kvquant.cli import main
from kvquant.energy.monitor import EnergyMonitor
from kvquant.energy.nvml import NvmlMeter, NvmlPowerMeter
from kvquant.errors import UserError
from kvquant.study.records import EnergyRecord, read_record
from tests.support.nvml import FakeNvml, FakeTime


@pytest.fixture
def no_carbon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves CodeCarbon's slow start out."""

    def fails(self: Any) -> Any:
        raise ImportError("not installed")

    monkeypatch.setattr("kvquant.energy.carbon.CarbonTracker._open", fails)


def test_a_trial_lasts_long_enough() -> None:
    time = FakeTime()
    meter = NvmlMeter(FakeNvml(time), [0, 1], now=time, sleep=time.sleep)
    monitor = EnergyMonitor(meter, now=time, sleep=time.sleep)
    trial = run_trial(lambda: time.sleep(0.7), 10, monitor, 5.0)
    assert trial.seconds == pytest.approx(8 * 0.7)  # seven jobs are 4.9 s
    assert trial.tokens == 80
    assert trial.joules == pytest.approx(400 * 5.6, abs=40)
    assert run_trial(lambda: time.sleep(9.0), 10, monitor, 5.0).tokens == 10


def test_joules_per_token_weigh_trials_by_tokens() -> None:
    found = side("x", [Trial(100.0, 1.0, 10), Trial(500.0, 3.0, 30)], idle_watts=50.0)
    assert found.joules_above_idle == [50.0, 350.0]
    assert found.joules_per_token == 600 / 40
    assert found.joules_per_token_above_idle == 400 / 40


def test_a_meter_that_stands_still_is_no_result() -> None:
    with pytest.raises(UserError, match=r"energy\.seconds: the meter counted no energy"):
        side("x", [Trial(0.0, 0.1, 10)], idle_watts=0.0)


def test_record(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_carbon: None
) -> None:
    assert main(command("energy")) == 0
    record = read_record(tmp_path / "rep0.json", EnergyRecord)
    assert record.source == "estimated"
    assert record.idle_watts > 0
    for one in (record.scheme_side, record.baseline_side):
        assert len(one.joules) == len(one.seconds) == len(one.tokens) == 2
        assert min(one.seconds) >= 0.05
        assert all(n % (144 + 3 * 2) == 0 for n in one.tokens)  # prompt and answer tokens
        assert all(
            above == pytest.approx(raw - record.idle_watts * seconds)
            for above, raw, seconds in zip(
                one.joules_above_idle, one.joules, one.seconds, strict=True
            )
        )
    ratio = record.scheme_side.joules_per_token / record.baseline_side.joules_per_token
    assert record.energy_ratio == pytest.approx(ratio)
    assert record.carbon["error"] == "not installed"
    assert record.carbon["country"] == "POL"
    assert record.telemetry["samples"] >= 1
    rows = list(csv.DictReader((tmp_path / "rep0.csv").read_text().splitlines()))
    assert len(rows) == record.telemetry["samples"]
    assert {r["label"] for r in rows} <= {"", "fp16", "kivi-4"}
    printed = capsys.readouterr().out
    assert "energy per token over the baseline" in printed
    assert "no counter was read" in printed


def test_trials_alternate(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_carbon: None
) -> None:
    order: list[str] = []
    plain = Prepared.job

    def job(self: Prepared, new_cache: Any) -> None:
        order.append("B" if new_cache == self.baseline else "S")
        plain(self, new_cache)

    monkeypatch.setattr(Prepared, "job", job)
    assert main(command("energy", workload="p32")) == 0
    blocks = [x for i, x in enumerate(order) if i == 0 or order[i - 1] != x]
    assert "".join(blocks) == "BS" * 3  # warm-up and two trials


def test_out_of_memory_is_one_line(
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_carbon: None,
) -> None:
    def job(self: Prepared, new_cache: Any) -> None:
        if new_cache == self.scheme:
            raise MemoryError

    monkeypatch.setattr(Prepared, "job", job)
    assert main(command("energy")) == 2
    assert "out of memory with the cache of 'kivi-4'" in capsys.readouterr().err
    assert not (tmp_path / "rep0.json").exists()


class OneGpu(FakeNvml):
    """A GPU of 300 W without an energy counter, whose every fourth reading fails."""

    def __init__(self) -> None:
        super().__init__(FakeTime(), (300.0,), counter=False)
        self.count = 0

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        self.count += 1
        if self.count % 4 == 0:
            raise RuntimeError("Timeout")
        return super().nvmlDeviceGetPowerUsage(handle)

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> Any:
        watts = self.nvmlDeviceGetPowerUsage(handle)
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=watts))]


def test_a_job_meters_the_devices_of_its_model_and_says_what_failed(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_carbon: None
) -> None:
    asked: list[Any] = []

    def open_meter(devices: Any) -> NvmlPowerMeter:
        asked.append(devices)
        meter = NvmlPowerMeter(OneGpu(), [0], interval=0.01)
        meter.min_seconds = 0.2
        meter.source, meter.method = "estimated", "of a test"  # the record is of a processor
        return meter

    monkeypatch.setattr("kvquant.benchmarks.energy.open_meter", open_meter)
    assert main(command("energy")) == 0
    assert asked == [[torch.device("cpu")]]  # where the weights are
    record = read_record(tmp_path / "rep0.json", EnergyRecord)
    assert record.idle_watts == pytest.approx(300, rel=0.01)
    for one in (record.scheme_side, record.baseline_side):
        assert min(one.seconds) >= 0.2  # as the meter needs, not the 0.05 s of the study
        watts = [j / s for j, s in zip(one.joules, one.seconds, strict=True)]
        assert watts == pytest.approx([300] * 2, rel=0.01)
    meter = record.telemetry["meter"]
    assert meter["errors"] >= 10 and meter["last_error"] == "Timeout"
    assert meter["samples"] > 2 * meter["errors"]


def test_a_meter_that_fails_for_long_ends_the_job_in_one_line(
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_carbon: None,
) -> None:
    monkeypatch.setattr("kvquant.energy.nvml.MAX_GAP", 0.05)
    gpu = OneGpu()
    plain = Prepared.job

    def job(self: Prepared, new_cache: Any) -> None:
        plain(self, new_cache)
        if new_cache == self.scheme:
            gpu.watts = ()  # every reading fails from here

    monkeypatch.setattr(Prepared, "job", job)
    monkeypatch.setattr(NvmlPowerMeter, "min_seconds", 0.2)
    monkeypatch.setattr(
        "kvquant.benchmarks.energy.open_meter",
        lambda devices: NvmlPowerMeter(gpu, [0], interval=0.01),
    )
    assert main(command("energy")) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("kvquant: error")]
    assert len(lines) == 1 and "NVML gave no power for" in lines[0]
    assert not (tmp_path / "rep0.json").exists()
