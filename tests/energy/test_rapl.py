"""Processor packages are counted once each, by counters that wrap, repeat each other or fail."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvquant.energy.estimate import EstimatedMeter, open_cpu_meter
from kvquant.energy.monitor import EnergyMonitor
from kvquant.energy.rapl import RaplMeter, package_zones
from kvquant.errors import UserError
from tests.support.nvml import FakeTime

RANGE = 262_143_328_850  # microjoules, of most processors


def zone(root: Path, name: str, domain: str, start: int = 1_000_000, wraps: int = RANGE) -> Path:
    place = root / name
    place.mkdir()
    (place / "name").write_text(f"{domain}\n")
    (place / "max_energy_range_uj").write_text(f"{wraps}\n")
    (place / "energy_uj").write_text(f"{start}\n")
    return place


def tick(place: Path, joules: float) -> None:
    file = place / "energy_uj"
    wraps = int((place / "max_energy_range_uj").read_text())
    file.write_text(f"{(int(file.read_text()) + round(joules * 1e6)) % wraps}\n")


@pytest.mark.fault(
    "devices",
    "RAPL with psys, MMIO, subzones, mirrored or separate dies",
    "each package is counted once",
)
@pytest.mark.parametrize(
    ("zones", "joules"),
    [
        ({"intel-rapl:0": ("package-0", 38.0), "intel-rapl:1": ("psys", 96.0)}, 38.0),
        ({"intel-rapl:0": ("psys", 96.0), "intel-rapl:1": ("package-0", 38.0)}, 38.0),
        ({"intel-rapl:0": ("package-0", 38.0), "intel-rapl:1": ("package-1", 40.0)}, 78.0),
        (
            {
                "intel-rapl:0": ("package-0", 38.0),
                "intel-rapl:0:0": ("core", 30.0),
                "intel-rapl:0:1": ("dram", 5.0),
                "intel-rapl:10": ("package-10", 2.0),
                "intel-rapl-mmio:0": ("package-0", 38.0),
                "intel-rapl-mmio:0:0": ("dram", 5.0),
                "dtpm:0": ("package-0", 38.0),
            },
            40.0,
        ),
        ({"intel-rapl:0": ("package-0", 38.0), "intel-rapl-tpmi:0": ("package-0", 38.0)}, 38.0),
        ({"intel-rapl-tpmi:0": ("package-0", 38.0)}, 38.0),
        ({"amd-rapl:0": ("package-0", 38.0), "amd-rapl:0:0": ("core", 20.0)}, 38.0),
        (  # the first two Zen generations: a counter shown once a die
            {f"intel-rapl:{i}": (f"package-0-die-{i}", 68.0) for i in range(4)},
            68.0,
        ),
        (  # two such sockets
            {
                f"intel-rapl:{2 * p + d}": (f"package-{p}-die-{d}", 60.0 + 8 * p)
                for p in range(2)
                for d in range(2)
            },
            128.0,
        ),
        (  # Cascade Lake-AP: each die has a counter of its own
            {"intel-rapl:0": ("package-0-die-0", 30.0), "intel-rapl:1": ("package-0-die-1", 38.0)},
            68.0,
        ),
    ],
)
def test_each_package_once(
    tmp_path: Path, zones: dict[str, tuple[str, float]], joules: float
) -> None:
    made = {name: zone(tmp_path, name, domain) for name, (domain, _) in zones.items()}
    meter = open_cpu_meter(tmp_path)
    before = meter.read()
    for _ in range(3):
        for name, (_, gained) in zones.items():
            tick(made[name], gained)
        meter.read()
    assert meter.read() - before == pytest.approx(3 * joules)


def test_dies_whose_counters_differ_when_opened_are_two(tmp_path: Path) -> None:
    """They gain the same here, so only where they stand tells that they are two."""
    first = zone(tmp_path, "intel-rapl:0", "package-0-die-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-0-die-1", 900_000_000)
    meter = open_cpu_meter(tmp_path)
    tick(first, 20.0)
    tick(second, 20.0)
    assert meter.read() == pytest.approx(40.0)
    assert "repeat" not in meter.method


def test_a_repeated_counter_is_read_a_little_later(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0-die-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-0-die-1", 1_200_000)
    meter = open_cpu_meter(tmp_path)
    assert "(intel-rapl:1 repeat another die's)" in meter.method
    tick(first, 50.0)
    tick(second, 49.9)
    assert meter.read() == pytest.approx(50.0)


@pytest.mark.fault(
    "devices",
    "RAPL counters that were mirrored and part",
    "refused in one line",
)
def test_repeated_counters_that_part_are_refused(tmp_path: Path) -> None:
    made = [zone(tmp_path, f"intel-rapl:{i}", f"package-0-die-{i}") for i in range(2)]
    meter = open_cpu_meter(tmp_path)
    for place in made:
        tick(place, 50.0)
    assert meter.read() == pytest.approx(50.0)
    tick(made[0], 50.0)
    with pytest.raises(UserError, match=r"intel-rapl:1: its energy counter repeated another die"):
        meter.read()


def test_each_zone_wraps_at_its_own_range_and_again(tmp_path: Path) -> None:
    small = zone(tmp_path, "intel-rapl:0", "package-0", 40_000_000, wraps=65_532_610)
    large = zone(tmp_path, "intel-rapl:1", "package-1", RANGE - 5_000_000)
    meter = open_cpu_meter(tmp_path)
    for round_ in range(1, 8):  # the small one wraps five times
        tick(small, 50.0)
        tick(large, 3.0)
        assert meter.read() == pytest.approx(53.0 * round_)


@pytest.mark.fault(
    "devices",
    "a RAPL counter that is set back",
    "refused; only a wrap is a wrap",
)
def test_a_counter_that_was_set_back_is_no_wrap(tmp_path: Path) -> None:
    place = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000_000)
    meter = open_cpu_meter(tmp_path)
    (place / "energy_uj").write_text("12\n")  # after sleep
    with pytest.raises(UserError, match=r"intel-rapl:0: .* from 9000000000 to 12 uJ.* set back"):
        meter.read()


@pytest.mark.fault(
    "devices",
    "RAPL unread for longer than one wrap",
    "refused in one line",
)
def test_too_long_without_a_reading(tmp_path: Path) -> None:
    place = zone(tmp_path, "intel-rapl:0", "package-0")
    time = FakeTime()
    monitor = EnergyMonitor(
        RaplMeter(package_zones(tmp_path), now=time), now=time, sleep=time.sleep
    )
    time.sleep(900.0)  # before the stretch: nobody's joules
    monitor.start()
    time.sleep(100.0)
    tick(place, 5000.0)
    assert monitor.stop().joules == pytest.approx(5000.0)
    monitor.start()
    time.sleep(900.0)
    with pytest.raises(UserError, match=r"900 s without a reading.* wrapped more than once"):
        monitor.stop()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("energy_uj", None, r"intel-rapl:1/energy_uj cannot be read \(No such file"),
        ("energy_uj", "many", r"intel-rapl:1/energy_uj cannot be read \(damaged"),
        ("energy_uj", "-5", r"intel-rapl:1/energy_uj cannot be read \(damaged"),
        ("max_energy_range_uj", None, r"intel-rapl:1/max_energy_range_uj cannot be read"),
        ("max_energy_range_uj", "0", r"intel-rapl:1: .* beyond the counter's range 0"),
        ("energy_uj", "999999999999999", r"intel-rapl:1: .* beyond the counter's range"),
    ],
)
def test_one_unreadable_package_leaves_the_estimate_and_is_named(
    tmp_path: Path, name: str, text: str | None, reason: str
) -> None:
    """A part of the packages would be a number that looks whole."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    broken = zone(tmp_path, "intel-rapl:1", "package-1")
    (broken / name).unlink() if text is None else (broken / name).write_text(text)
    meter = open_cpu_meter(tmp_path)
    assert isinstance(meter, EstimatedMeter)
    assert re.search(reason, meter.method), meter.method


@pytest.mark.fault(
    "devices",
    "RAPL counters that may not be read",
    "estimated; the file is named",
)
def test_a_forbidden_counter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    plain = Path.read_text

    def read(self: Path, *args: object, **more: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return plain(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", read)
    method = open_cpu_meter(tmp_path).method
    assert "RAPL: intel-rapl:0/energy_uj cannot be read (Permission denied)" in method


def test_a_counter_that_goes_away_ends_by_name(tmp_path: Path) -> None:
    place = zone(tmp_path, "intel-rapl:0", "package-0")
    meter = open_cpu_meter(tmp_path)
    (place / "energy_uj").unlink()
    with pytest.raises(UserError, match=r"intel-rapl:0/energy_uj cannot be read \(No such file"):
        meter.read()


def test_a_machine_without_packages(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "psys")
    assert "RAPL: no processor package has a counter" in open_cpu_meter(tmp_path).method


@pytest.mark.fault(
    "devices",
    "four threads read one meter",
    "the right sum",
)
def test_threads_read_one_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers must not both add the same step, nor take the older value for a wrap."""
    place = zone(tmp_path, "intel-rapl:0", "package-0")
    meter = open_cpu_meter(tmp_path)
    value, plain, guard = [1_000_000], Path.read_text, threading.Lock()

    def read(self: Path, *args: object, **more: object) -> str:
        if self != place / "energy_uj":
            return plain(self, *args, **more)  # type: ignore[arg-type]
        with guard:
            value[0] += 1000
            found = value[0]
        threading.Event().wait(0.0005)  # the other thread's turn between reading and adding
        return f"{found}\n"

    monkeypatch.setattr(Path, "read_text", read)
    with ThreadPoolExecutor(4) as pool:
        for reader in [pool.submit(lambda: [meter.read() for _ in range(40)]) for _ in range(4)]:
            assert reader.result() == sorted(reader.result())
    assert meter.read() == pytest.approx((value[0] - 1_000_000) / 1e6)
