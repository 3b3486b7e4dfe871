"""What records say of the machine."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvquant.runtime import provenance


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of two different GPUs, as NVML shows it."""
    names = {"GPU-a": "NVIDIA A100", "GPU-b": "NVIDIA H100 80GB HBM3"}
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda i: list(names)[i],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetName=names.__getitem__,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 << 30),
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)


@pytest.mark.parametrize("used", [True, False])
def test_gpus_are_those_of_the_process(
    two_gpus: Any, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(provenance, "visible_uuids", lambda: ["GPU-b"])
    expected = ["NVIDIA H100 80GB HBM3"] if used else ["NVIDIA A100", "NVIDIA H100 80GB HBM3"]
    assert [gpu["name"] for gpu in provenance._gpus()] == expected


def test_a_machine_without_nvml_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert provenance._gpus() == []
    assert provenance.device_name() == "cpu"
