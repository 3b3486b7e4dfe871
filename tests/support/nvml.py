"""Time and NVML that obey the test."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeTime:
    """Seconds that pass by sleeping."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeNvml:
    """Two GPUs of constant power whose energy counters refresh every 100 ms.

    Args:
        time: The clock that the counters follow.
        watts: Power of each GPU.
        counter: False for GPUs without an energy counter, "stuck" for one that stands still.
    """

    def __init__(
        self, time: FakeTime, watts: tuple[float, ...] = (300.0, 100.0), counter: object = True
    ) -> None:
        self.time = time
        self.watts = watts
        self.counter = counter
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        self.asked.append("init")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.watts)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        self.asked.append(uuid)
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if not self.counter:
            raise RuntimeError("Not Supported")
        steps = 0 if self.counter == "stuck" else int(self.time.now / 0.1 + 1e-6)
        return round(steps * 0.1 * self.watts[handle] * 1e3)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return round(self.watts[handle] * 1e3)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 40 + handle

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=90, memory=30)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return 4 if handle else 1


@dataclass
class Board:
    """A GPU of a host.

    Attributes:
        slices: (UUID, name) of its MIG slices; None where MIG is off.
        allowed: Whether this process may open it.
        watts: Power it draws.
    """

    uuid: str
    name: str
    slices: list[tuple[str, str]] | None = None
    allowed: bool = True
    watts: float = 60.0


class FakeHost:
    """NVML of a host of several GPUs, in the order of the PCI bus; handles are UUIDs.

    Args:
        boards: Its GPUs.
        time: The clock that energy counters follow; None has no counters.
    """

    def __init__(self, boards: list[Board], time: FakeTime | None = None) -> None:
        self.boards = {board.uuid: board for board in boards}
        self.time = time

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        board = list(self.boards.values())[index]
        if not board.allowed:
            raise RuntimeError("Insufficient Permissions")
        return board.uuid

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return list(self.boards).index(handle)

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def _slices(self) -> dict[str, tuple[Board, str]]:
        return {uuid: (b, name) for b in self.boards.values() for uuid, name in b.slices or ()}

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid in self.boards or uuid in self._slices():
            return uuid
        raise RuntimeError("Not Found")

    def nvmlDeviceGetName(self, handle: str) -> str:
        return self.boards[handle].name if handle in self.boards else self._slices()[handle][1]

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return [int(self.boards[handle].slices is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        return (self.boards[handle].slices or [])[index][0]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return self._slices()[handle][0].uuid

    def nvmlDeviceGetGpuInstanceId(self, handle: str) -> int:
        return [uuid for uuid, _ in self._slices()[handle][0].slices or ()].index(handle) + 1

    def nvmlDeviceGetComputeInstanceId(self, handle: str) -> int:
        return 0

    def nvmlDeviceGetAttributes(self, handle: str) -> Any:
        return SimpleNamespace(
            gpuInstanceSliceCount=3, computeInstanceSliceCount=3, memorySizeMB=20096
        )

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=80 << 30)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.time is None or handle not in self.boards:
            raise RuntimeError("Not Supported")
        return round(int(self.time.now / 0.1 + 1e-6) * 0.1 * self.boards[handle].watts * 1e3)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return round(self.boards[handle].watts * 1e3)


def torch_sees(patch: pytest.MonkeyPatch, uuids: list[str], *, current: int | None = None) -> None:
    """Torch as on a host where CUDA shows these devices.

    Args:
        patch: Undoes it.
        uuids: UUIDs of the devices as torch tells them: without "GPU-" or "MIG-".
        current: The current device; None before CUDA was started.
    """

    def which() -> int:
        if current is None:
            raise RuntimeError("no CUDA")
        return current

    patch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
    patch.setattr(torch.cuda, "is_initialized", lambda: current is not None)
    patch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    patch.setattr(torch.cuda, "current_device", which)
    patch.setattr(torch.cuda, "set_device", lambda index: None)
    patch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(uuid=uuids[i], name=f"torch {uuids[i]}", total_memory=1),
    )
