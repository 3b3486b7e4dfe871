"""Energy without a GPU counter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvquant.energy.estimate import EstimatedMeter, RaplMeter, open_cpu_meter


def test_estimate_is_a_share_of_the_design_power() -> None:
    now, busy = [0.0], [0.0]
    meter = EstimatedMeter(10.0, 0.3, cores=4, now=lambda: now[0], busy=lambda: busy[0])
    assert meter.source == "estimated"
    assert "no counter was read" in meter.method
    first = meter.read()
    now[0] = 2.0
    assert meter.read() - first == pytest.approx(2 * 4 * 10 * 0.3)  # idle
    busy[0] = 8.0  # four cores busy for two seconds: the full design power
    assert meter.read() - first == pytest.approx(2 * 4 * 10)


def test_real_estimate_grows_with_work() -> None:
    meter = open_cpu_meter()
    first = meter.read()
    sum(i * i for i in range(300_000))
    assert meter.read() > first
    assert meter.source == "estimated"
    assert meter.telemetry()[0]["device"] == "cpu"


WORK = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


def test_the_work_of_several_processes_counts() -> None:
    meter = EstimatedMeter(10.0, 0.0)
    with subprocess.Popen(
        [sys.executable, "-c", WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        meter.count([os.getpid(), other.pid])
        assert "2 processes" in meter.method
        assert other.stdout is not None and other.stdout.readline() == "done\n"
        own = time.process_time()
        counted = meter.read()
        assert counted >= 10 * (own + 0.3 - 0.05)  # the system counts in hundredths of a second
        other.communicate("\n")
    assert meter.read() >= counted  # what it used stays, though it has ended


def zone(folder: Path, name: str, microjoules: int) -> Path:
    place = folder / name
    place.mkdir()
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text("1000000\n")
    return place


def test_rapl_sums_packages_and_unwraps(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", 900_000), zone(tmp_path, "intel-rapl:1", 0)
    zone(tmp_path, "intel-rapl:0:0", 0)  # a part of package 0
    meter = open_cpu_meter(tmp_path)
    assert isinstance(meter, RaplMeter)
    assert "rapl" in meter.method
    assert "2 processor package(s)" in meter.method
    assert meter.source == "estimated"  # the whole machine, not the job
    assert meter.read() == 0.0
    (second / "energy_uj").write_text("250000")
    assert meter.read() == pytest.approx(0.25)
    (first / "energy_uj").write_text("100000")  # wrapped
    assert meter.read() == pytest.approx(0.45)


def test_unreadable_rapl_falls_back(tmp_path: Path) -> None:
    (zone(tmp_path, "intel-rapl:0", 5) / "energy_uj").unlink()
    assert isinstance(open_cpu_meter(tmp_path), EstimatedMeter)
