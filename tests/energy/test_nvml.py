"""Power that is sampled and integrated: failed readings, averages, impossible watts."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvquant.benchmarks.energy import run_trial, side
from kvquant.energy import nvml as energy_nvml
from kvquant.energy.monitor import EnergyMonitor, open_meter
from kvquant.energy.nvml import NvmlMeter, NvmlPowerMeter
from kvquant.energy.profiler import DetailedEnergyProfiler
from kvquant.errors import UserError
from tests.support.nvml import FakeNvml, FakeTime

BOX = 0.2  # seconds that the fake averages over, to keep the tests short


class Gpu:
    """A GPU whose load follows a script, on the real clock.

    Args:
        instant: Whether it tells power of this moment.
        fails: Numbers of the readings that fail.
    """

    def __init__(self, instant: bool = False, fails: range = range(0)) -> None:
        self.changes = [(float("-inf"), 60.0)]  # (moment, watts from there)
        self.instant = instant
        self.fails = fails
        self.count = 0
        self.odd: dict[int, float] = {}

    def load(self, watts: float) -> None:
        self.changes.append((time.monotonic(), watts))

    def joules(self, start: float, end: float) -> float:
        ends = [moment for moment, _ in self.changes[1:]] + [float("inf")]
        parts = [
            (max(0.0, min(end, until) - max(start, since)), watts)
            for (since, watts), until in zip(self.changes, ends, strict=True)
        ]
        return sum(seconds * watts for seconds, watts in parts)

    def _counted(self, watts: float) -> float:
        self.count += 1
        if self.count in self.fails:
            raise RuntimeError("Timeout")
        return self.odd.get(self.count, watts)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> float:
        now = time.monotonic()
        return self._counted(self.joules(now - BOX, now) / BOX) * 1e3

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> Any:
        assert fields == [186]
        if not self.instant:
            return [SimpleNamespace(nvmlReturn=3, value=SimpleNamespace(uiVal=0))]
        watts = self._counted(self.changes[-1][1])
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=round(watts * 1e3)))]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 500_000

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=100, memory=50)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_nvml, "AVERAGED", BOX)
    monkeypatch.setattr(NvmlPowerMeter, "min_seconds", 0.0)


def job(gpu: Gpu, watts: float, seconds: float = 0.3) -> None:
    gpu.load(watts)
    time.sleep(seconds)
    gpu.load(60.0)


@pytest.mark.fault(
    "devices",
    "power averaged over a second, sides in turns",
    "each side has its own joules",
)
@pytest.mark.parametrize("instant", [True, False])
def test_sides_in_turns_have_their_own_joules(instant: bool) -> None:
    """Joined, an average over a second would give the weaker side a part of the stronger's."""
    gpu = Gpu(instant)
    meter = NvmlPowerMeter(gpu, [0], interval=0.005)
    monitor = EnergyMonitor(meter)
    found = []
    try:
        for _ in range(2):
            for watts in (400.0, 172.0):
                trial = run_trial(lambda w=watts: job(gpu, w), 100, monitor, 0.3)  # type: ignore[misc]
                found.append(side("x", [trial], 0.0).joules[0] / trial.seconds)
    finally:
        meter.close()
    assert found == pytest.approx([400, 172, 400, 172], rel=0.12)
    assert ("an average over a second" in meter.method) is not instant


@pytest.mark.fault(
    "devices",
    "NVML readings that fail",
    "bridged up to a second, and counted",
)
@pytest.mark.parametrize("instant", [True, False])
def test_failed_readings_are_bridged_and_counted(instant: bool) -> None:
    gpu = Gpu(instant, fails=range(20, 26))
    meter = NvmlPowerMeter(gpu, [0], interval=0.005)
    monitor = EnergyMonitor(meter)
    monitor.start()
    begun = time.monotonic()
    job(gpu, 400.0, 0.6)
    reading = monitor.stop()
    meter.close()
    assert reading.joules == pytest.approx(gpu.joules(begun, begun + reading.seconds), rel=0.12)
    found = meter.quality()
    assert found["errors"] >= 6
    assert found["last_error"] == "Timeout"
    assert found["samples"] > 40
    assert found["gaps"] >= 1
    assert 0.02 < found["longest_gap_s"] <= 1.0


@pytest.mark.fault(
    "devices",
    "no power reading for long",
    "refused in one line",
)
def test_a_gap_that_cannot_be_bridged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_nvml, "MAX_GAP", 0.25)
    gpu = Gpu(instant=True)
    meter = NvmlPowerMeter(gpu, [0], interval=0.005)
    monitor = EnergyMonitor(meter)
    monitor.start()
    gpu.fails = range(gpu.count, 10**9)
    time.sleep(0.35)
    with pytest.raises(UserError, match=r"NVML gave no power for 0\.\d s \(Timeout\)"):
        monitor.stop()  # nothing since
    gpu.fails = range(0)
    time.sleep(0.05)
    with pytest.raises(UserError, match=r"more than the 0\.25 s that can be interpolated"):
        monitor.stop()  # it came back, and the stretch has a hole
    monitor.start()  # a stretch after it has none
    time.sleep(0.05)
    assert monitor.stop().joules == pytest.approx(60 * 0.05, rel=0.4)
    meter.close()


@pytest.mark.fault(
    "devices",
    "watts that are NaN, infinite, negative, over the limit, or 0 while busy",
    "left out and counted",
)
@pytest.mark.parametrize("watts", [float("nan"), float("inf"), -5.0, 751.0, 4e6, 0.0])
def test_watts_that_cannot_be_are_left_out(watts: float) -> None:
    """751 W of a board whose limit is 500 W; 0 W of one that works."""
    gpu = Gpu()
    meter = NvmlPowerMeter(gpu, [0], interval=0)
    gpu.odd[gpu.count + 1] = watts
    before = meter.read()  # asks again at once
    assert 0 <= before < 60 * 0.1
    found = meter.quality()
    assert found["errors"] == 1
    last = found["last_error"]
    assert "this GPU cannot draw" in last or "0 W for a busy GPU" in last


@pytest.mark.fault(
    "devices",
    "0 W of a second GPU that does not tell whether it is busy",
    "no energy is measured",
)
def test_nothing_in_place_of_watts_is_not_counted_as_none() -> None:
    class Shared(FakeNvml):
        def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
            raise RuntimeError("Not Supported")

    clock = FakeTime()
    nvml = Shared(clock, watts=(300.0, 0.0), counter=False)
    with pytest.raises(RuntimeError, match="0 W and not whether the GPU is busy"):
        NvmlPowerMeter(nvml, [0, 1], interval=0)
    meter = open_meter("cuda", nvml=nvml, find_uuids=lambda: ["0", "1"])
    assert meter.source == "estimated"


@pytest.mark.fault(
    "devices",
    "the energy counter of one of several GPUs stops",
    "refused in one line that names the GPU",
)
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_counter_that_stops_beside_others_ends_by_name(stopped: int) -> None:
    clock = FakeTime()
    nvml = FakeNvml(clock)
    meter = NvmlMeter(nvml, [0, 1], now=clock, sleep=clock.sleep)
    monitor = EnergyMonitor(meter, now=clock, sleep=clock.sleep)
    clock.sleep(60.0)  # nobody reads while a model is loaded
    monitor.start()
    clock.sleep(0.01)  # a reading within one refresh of another is none of a counter that stopped
    meter.read()
    clock.sleep(6.0)
    assert monitor.stop().joules == pytest.approx(6 * 400, rel=0.03)
    monitor.start()
    plain, at = nvml.nvmlDeviceGetTotalEnergyConsumption, clock.now

    def counter(handle: int) -> int:
        kept, clock.now = clock.now, at if handle == stopped else clock.now
        try:
            return plain(handle)
        finally:
            clock.now = kept

    nvml.nvmlDeviceGetTotalEnergyConsumption = counter  # type: ignore[method-assign]
    clock.sleep(6.0)
    with pytest.raises(UserError, match=f"counter of GPU {stopped} stands still at"):
        monitor.stop()


def test_one_failed_reading_opens_no_other_meter() -> None:
    """Neither when a meter is opened nor later does a passing error change what is counted."""
    clock = FakeTime()
    nvml = FakeNvml(clock)
    plain, count = nvml.nvmlDeviceGetTotalEnergyConsumption, [0]

    def now_and_then(handle: int) -> int:
        count[0] += 1
        if count[0] % 3 == 0:
            raise RuntimeError("Timeout")
        return plain(handle)

    nvml.nvmlDeviceGetTotalEnergyConsumption = now_and_then  # type: ignore[method-assign]
    meter = NvmlMeter(nvml, [0], now=clock, sleep=clock.sleep)
    monitor = EnergyMonitor(meter, now=clock, sleep=clock.sleep)
    assert monitor.idle_watts(5.0) == pytest.approx(300, rel=0.03)
    assert meter.quality()["errors"] > 0


@pytest.mark.fault(
    "devices",
    "an energy counter that is reset or impossibly fast",
    "refused in one line",
)
@pytest.mark.parametrize(("factor", "message"), [(0.0, "counter reset"), (9.0, "can draw")])
def test_a_counter_that_cannot_be_true_ends_by_name(factor: float, message: str) -> None:
    """It starts again with the driver, or runs faster than the board can draw."""
    clock = FakeTime()
    nvml = FakeNvml(clock)
    meter = NvmlMeter(nvml, [0, 1], now=clock, sleep=clock.sleep)
    monitor = EnergyMonitor(meter, now=clock, sleep=clock.sleep)
    monitor.start()
    clock.sleep(6.0)
    plain = nvml.nvmlDeviceGetTotalEnergyConsumption
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda h: round(factor * plain(h))  # type: ignore[assignment, method-assign]
    with pytest.raises(UserError, match=message):
        monitor.stop()


def test_a_counter_that_goes_away_ends_by_name() -> None:
    clock = FakeTime()
    nvml = FakeNvml(clock)
    meter = NvmlMeter(nvml, [1], now=clock, sleep=clock.sleep)
    nvml.counter = False
    with pytest.raises(UserError, match=r"counter of GPU 0 cannot be read \(Not Supported\)"):
        meter.read()


@pytest.mark.fault(
    "devices",
    "a failed reading in the profiler",
    "sampling goes on, the failure is counted",
)
def test_the_profiler_goes_on_after_a_failed_reading() -> None:
    class Meter:
        source, method, count = "estimated", "fake", 0

        def read(self) -> float:
            self.count += 1
            if self.count in (1, 3, 4):
                raise RuntimeError("Timeout\nmore")
            return float(self.count)

        def telemetry(self) -> list[dict[str, Any]]:
            if self.count == 8:
                raise RuntimeError("Timeout")
            return [{"device": "gpu0", "power_w": 5.0}]

        def close(self) -> None: ...

    with DetailedEnergyProfiler(Meter(), interval=0.002) as profiler:  # type: ignore[arg-type]
        for _ in range(500):
            if len(profiler.samples) > 8:
                break
            time.sleep(0.01)
    found = profiler.summary()
    assert found["samples"] > 8
    assert found["errors"] >= 3
    assert found["last_error"] == "Timeout"


@pytest.mark.fault(
    "devices",
    "a time of day that jumps",
    "no duration changes",
)
def test_no_duration_follows_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time of day jumps by an hour in the middle: no seconds, watts or joules notice."""
    from kvquant.benchmarks.timing import Clock
    from kvquant.energy.estimate import EstimatedMeter

    wall = [1e9]

    def jumps() -> float:
        wall[0] -= 3600.0
        return wall[0]

    monkeypatch.setattr(time, "time", jumps)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumps() * 1e9))
    monitor = EnergyMonitor(EstimatedMeter(10.0, 1.0, cores=1))
    trial = run_trial(lambda: time.sleep(0.05), 1, monitor, 0.1)
    assert 0.1 <= trial.seconds < 5
    assert trial.joules == pytest.approx(10 * trial.seconds, rel=0.2)
    assert 50 <= Clock().time(lambda: time.sleep(0.05))[1] < 5000
