"""`GpuUse`: samples how busy GPUs are, by NVML and without starting CUDA."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

INTERVAL = 0.2  # seconds; NVML's own sampling period is between 1/6 s and 1 s


class GpuUse:
    """Samples the utilization of GPUs while a `with` block runs.

    NVML's utilization is the share of a short period in which a kernel ran. A GPU whose kernels
    follow one another closely is busy by it, however few multiprocessors they use.

    Args:
        nvml: The pynvml module.
        handles: NVML handles of the GPUs.
        interval: Seconds between samples.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any], interval: float = INTERVAL) -> None:
        self._nvml, self._handles, self._interval = nvml, list(handles), interval
        self._samples: list[list[float]] = [[] for _ in self._handles]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()

    def sample(self) -> None:
        """Takes a sample of each GPU that tells its utilization."""
        for handle, taken in zip(self._handles, self._samples, strict=True):
            try:
                taken.append(float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
            except Exception:  # a GPU, slice or driver that does not tell, or not now
                continue

    @property
    def idle_share(self) -> list[float | None]:
        """The share of samples in which a GPU did nothing, by GPU; None without a sample."""
        return [sum(u == 0 for u in s) / len(s) if s else None for s in self._samples]

    @property
    def utilization(self) -> list[float | None]:
        """The mean utilization in percent, by GPU; None without a sample."""
        return [sum(s) / len(s) if s else None for s in self._samples]

    def __enter__(self) -> GpuUse:
        """Starts to sample."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends sampling."""
        self._stop.set()
        self._thread.join()
