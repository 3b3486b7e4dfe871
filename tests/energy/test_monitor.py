"""NVML meters and the monitor, with fake GPUs and fake time."""

from __future__ import annotations

from typing import Any

import pytest

from kvquant.energy.monitor import EnergyMonitor, open_meter
from kvquant.energy.nvml import NvmlMeter, NvmlPowerMeter, gpu_handles, refresh_seconds
from tests.energy.fakes import FakeNvml, FakeTime


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


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    meter = open_meter("cuda")
    assert meter.source == "nvml"
    assert 5 < EnergyMonitor(meter).idle_watts(2.0) < 2000
    meter.close()
