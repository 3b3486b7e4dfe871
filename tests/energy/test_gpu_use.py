"""How busy GPUs are: idle samples, the mean, and GPUs that tell nothing."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from kvquant.energy.gpu_use import GpuUse


class Told:
    """NVML whose GPUs tell one number after the other, and then none."""

    def __init__(self, *numbers: list[int]) -> None:
        self.left = list(map(list, numbers))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=self.left[handle].pop(0))


def test_idle_is_what_did_nothing() -> None:
    use = GpuUse(Told([0, 50, 100, 0], [100, 100, 100, 100], []), [0, 1, 2])
    assert use.idle_share == use.utilization == [None, None, None]
    for _ in range(5):  # once more than they tell
        use.sample()
    assert use.idle_share == [0.5, 0.0, None]
    assert use.utilization == [37.5, 100.0, None]


def test_samples_are_taken_while_work_runs() -> None:
    told = Told([0] * 1000)
    with GpuUse(told, [0], interval=0.01) as use:
        end = time.monotonic() + 5
        while use.idle_share == [None] and time.monotonic() < end:
            time.sleep(0.01)
    assert use.idle_share == [1.0]
    left = len(told.left[0])
    time.sleep(0.05)
    assert len(told.left[0]) == left
