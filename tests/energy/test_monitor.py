"""NVML meters and the monitor, with fake GPUs and fake time."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from kvquant.benchmarks.energy import run_trial
from kvquant.energy.monitor import EnergyMonitor, not_metered, open_meter
from kvquant.energy.nvml import NvmlMeter, NvmlPowerMeter, gpu_handles, refresh_seconds
from kvquant.errors import UserError
from tests.support.nvml import Board, FakeHost, FakeNvml, FakeTime, torch_sees


def monitor_of(meter: Any, time: FakeTime, **more: Any) -> EnergyMonitor:
    return EnergyMonitor(meter, now=time, sleep=time.sleep, **more)


def test_counter_sums_all_gpus() -> None:
    time = FakeTime()
    meter = NvmlMeter(FakeNvml(time), [0, 1], now=time, sleep=time.sleep)
    assert meter.source == "nvml"
    assert "total energy counter of 2 GPU(s), refreshed every 100 ms" in meter.method
    monitor = monitor_of(meter, time)
    monitor.start()
    time.sleep(5.0)
    reading = monitor.stop()
    assert reading.seconds == pytest.approx(5.0)
    assert reading.joules == pytest.approx(5.0 * 400, abs=0.1 * 400)  # one refresh at most
    assert monitor.idle_watts(10.0) == pytest.approx(400, rel=0.02)


def test_the_device_is_drained_on_both_ends() -> None:
    time = FakeTime()
    meter = NvmlMeter(FakeNvml(time), [0], now=time, sleep=time.sleep)
    monitor = monitor_of(meter, time, wait=lambda: time.sleep(1.0))
    monitor.start()
    assert monitor.stop().seconds == pytest.approx(1.0)


def test_refresh_is_measured() -> None:
    time = FakeTime()
    nvml = FakeNvml(time)
    period = refresh_seconds(
        lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(0), now=time, sleep=time.sleep
    )
    assert period == pytest.approx(0.1, abs=0.005)
    assert refresh_seconds(lambda: 5.0, now=time, sleep=time.sleep) is None


@pytest.mark.parametrize("counter", [False, "stuck"])
def test_without_a_working_counter_power_is_integrated(counter: object) -> None:
    time = FakeTime()
    meter = open_meter("cuda", nvml=FakeNvml(time, counter=counter), find_uuids=lambda: None)
    try:
        assert isinstance(meter, NvmlPowerMeter)
        assert meter.source == "nvml"
        assert "power of 2 GPU(s) integrated" in meter.method
    finally:
        meter.close()


def test_power_is_integrated_by_trapezoids() -> None:
    time = FakeTime()
    nvml = FakeNvml(time, watts=(100.0,))
    meter = NvmlPowerMeter(nvml, [0], interval=0, now=time)
    time.sleep(2.0)
    nvml.watts = (300.0,)
    assert meter.read() == pytest.approx(2 * (100 + 300) / 2)
    time.sleep(1.0)
    assert meter.read() == pytest.approx(400 + 300)


def test_only_the_gpus_of_this_job_count() -> None:
    time = FakeTime()
    nvml = FakeNvml(time)
    assert gpu_handles(nvml, ["GPU-1"]) == [1]
    meter = NvmlMeter(nvml, gpu_handles(nvml, ["GPU-1"]), now=time, sleep=time.sleep)
    monitor = monitor_of(meter, time)
    assert monitor.idle_watts(10.0) == pytest.approx(100, rel=0.02)
    assert gpu_handles(nvml, None) == [0, 1]


def test_no_gpu_at_all_is_an_estimate_that_says_why() -> None:
    meter = open_meter("cuda", nvml=FakeNvml(FakeTime(), watts=()), find_uuids=lambda: None)
    assert meter.source == "estimated"
    assert "NVML: no GPU" in meter.method


def test_telemetry_of_each_gpu() -> None:
    time = FakeTime()
    nvml = FakeNvml(time)
    meter = NvmlMeter(nvml, [0, 1], now=time, sleep=time.sleep)
    first, second = meter.telemetry()
    assert first == {
        "device": "gpu0",
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "temperature_c": 40,
        "power_w": 300.0,
        "power_limit_w": 700.0,
        "utilization_percent": 90,
        "memory_utilization_percent": 30,
        "throttle_reasons": 1,
    }
    assert (second["device"], second["temperature_c"]) == ("gpu1", 41)

    def missing(handle: int, sensor: int) -> int:
        raise RuntimeError("Not Supported")

    nvml.nvmlDeviceGetTemperature = missing  # type: ignore[method-assign]
    assert meter.telemetry()[0]["temperature_c"] is None


def test_idle_of_no_time_is_zero() -> None:
    time = FakeTime()
    meter = NvmlMeter(FakeNvml(time), [0], now=time, sleep=time.sleep)
    assert monitor_of(meter, time).idle_watts(0) == 0.0


def node(time: FakeTime) -> FakeHost:
    """GPU 1 works at 350 W, the others idle."""
    boards = [Board(f"GPU-{i}", "NVIDIA H100", watts=350.0 if i == 1 else 55.0) for i in range(8)]
    return FakeHost(boards, time)


@pytest.mark.fault(
    "devices",
    "eight visible GPUs, a model on one or two",
    "these are metered, the others stated as idle",
)
@pytest.mark.parametrize(
    ("devices", "watts", "count"),
    [
        ("cuda:1", 350, 1),
        ("cuda", 350, 1),  # the current device
        (torch.device("cuda", 0), 55, 1),
        ([torch.device("cuda", 0), torch.device("cuda", 1)], 405, 2),  # a model over two
        (["cuda:1", "cuda:1"], 350, 1),
        (["cpu", "cuda:1"], 350, 1),
    ],
)
def test_the_gpus_of_the_model_and_no_other(
    monkeypatch: pytest.MonkeyPatch, devices: Any, watts: float, count: int
) -> None:
    time = FakeTime()
    defaults = {"now": time, "sleep": time.sleep}
    monkeypatch.setattr(NvmlMeter.__init__, "__kwdefaults__", defaults)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    nvml = node(time)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    torch_sees(monkeypatch, ["0", "1", "2", "3"], current=1)
    meter = open_meter(devices)
    assert f"of {count} GPU(s)" in meter.method
    assert ("processor is not counted" in meter.method) is (devices == ["cpu", "cuda:1"])
    assert monitor_of(meter, time).idle_watts(10.0) == pytest.approx(watts, rel=0.02)
    assert meter.indices == ([0, 1] if count == 2 else [1 if watts == 350 else 0])  # type: ignore[attr-defined]
    unused = not_metered(meter)["idle_gpus"]
    assert unused["names"] == {"NVIDIA H100": 4 - count}  # of those that the job may use
    assert unused["watts"] == pytest.approx(3 * 55 + 350 - watts)


@pytest.mark.fault(
    "devices",
    "energy on a MIG slice",
    "refused in one line",
)
def test_energy_of_a_slice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FakeHost([Board("GPU-e", "NVIDIA A100", [("MIG-1", "NVIDIA A100 MIG 1g.5gb")])])
    torch_sees(monkeypatch, ["1"], current=0)
    with pytest.raises(UserError, match=r"NVIDIA A100 MIG 1g\.5gb is a MIG slice, .* whole board"):
        open_meter("cuda", nvml=host)


@pytest.mark.fault(
    "devices",
    "a GPU that NVML does not know by its UUID",
    "marked as estimated, with the reason",
)
def test_a_gpu_that_nvml_does_not_know_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Better no measurement than that of another GPU."""
    torch_sees(monkeypatch, ["other"], current=0)
    meter = open_meter("cuda", nvml=node(FakeTime()))
    assert meter.source == "estimated"
    assert "NVML knows no GPU with torch's UUID 'other'" in meter.method


def test_a_trial_is_as_long_as_its_meter_needs() -> None:
    time = FakeTime()
    meter = NvmlMeter(FakeNvml(time), [0], now=time, sleep=time.sleep)
    trial = run_trial(lambda: time.sleep(0.05), 1, monitor_of(meter, time), 0.05)
    assert trial.seconds >= 5.0
    assert trial.joules == pytest.approx(300 * trial.seconds, rel=0.02)
    meter.refresh = 0.3
    assert monitor_of(meter, time).idle_watts(0.1) == pytest.approx(300, rel=0.05)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    meter = open_meter("cuda")
    assert meter.source == "nvml"
    assert 5 < EnergyMonitor(meter).idle_watts(2.0) < 2000
    meter.close()
