"""A machine of several GPUs without any: NVML, torch's view of it, and tensors that say so."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.energy import nvml
from kvquant.runtime import devices
from tests.support.nvml import Board, FakeHost, FakeTime, torch_sees
from tests.support.pretend_gpus import pretend_gpus

NAME = "h100-80gb-hbm3"
MEMORY = 80 * 10**9  # bytes of each GPU
FASTER = 50  # counters refresh that much faster than real ones, so that trials may be short


class RealTime(FakeTime):
    """The machine's own clock, which the counters follow."""

    @property
    def now(self) -> float:  # type: ignore[override]
        """Seconds, faster than they pass."""
        return time.monotonic() * FASTER

    def __init__(self) -> None:
        """Starts nothing, as the clock runs."""


class TimedEvent:
    """A CUDA event behind work that is done at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Keeps the moment."""
        self._at = time.perf_counter()

    def query(self) -> bool:
        """Whether the work is done."""
        return True

    def elapsed_time(self, end: TimedEvent) -> float:
        """Milliseconds until another event."""
        return (end._at - self._at) * 1e3


@dataclass
class Machine:
    """What a test asks for.

    Attributes:
        host: NVML.
        locks: The folder of claims.
        limits: The share of its memory to which torch was limited, by the number of the GPU.
        current: The GPUs that became torch's current one.
    """

    host: FakeHost
    locks: Path
    limits: dict[int, list[float]] = field(default_factory=dict)
    current: list[int] = field(default_factory=list)


@contextmanager
def pretend_machine(
    folder: Path, boards: Sequence[float] = (100.0, 300.0), visible: Sequence[int] | None = None
) -> Iterator[Machine]:
    """Pretends that this is a machine with several H100.

    Args:
        folder: Where GPUs are claimed.
        boards: The watts of its GPUs, in the order of the PCI bus.
        visible: The boards that CUDA shows, in its order; None: all.
    """
    every = [Board(f"GPU-{i:02x}", "NVIDIA H100 80GB HBM3", watts=w) for i, w in enumerate(boards)]
    shown = list(range(len(every)) if visible is None else visible)
    machine = Machine(FakeHost(every, RealTime()), folder / "locks")
    held: dict[Path, Any] = {}

    def limit(share: float, device: torch.device) -> None:
        machine.limits.setdefault(int(device.index), []).append(share)

    with pytest.MonkeyPatch.context() as patch, pretend_gpus():
        torch_sees(patch, [f"{i:02x}" for i in shown], current=0)
        patch.setitem(sys.modules, "pynvml", machine.host)
        patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, shown)))
        patch.setattr(devices, "_held", held)
        patch.setattr(devices, "_folder", lambda: machine.locks)
        patch.setattr(nvml, "MIN_TRIAL", 0.1)
        for name, value in {
            "set_device": lambda index: machine.current.append(int(index)),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "Event": TimedEvent,
            "mem_get_info": lambda device: (MEMORY, MEMORY),
            "memory_reserved": lambda device: 0,
            "set_per_process_memory_fraction": limit,
            "reset_peak_memory_stats": lambda device: None,
            "max_memory_allocated": lambda device: 1000 * (1 + device.index),
            "memory_allocated": lambda device: 100 * (1 + device.index),
        }.items():
            patch.setattr(torch.cuda, name, value)
        try:
            yield machine
        finally:
            for handle in held.values():
                handle.close()
