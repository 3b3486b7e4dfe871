"""What records say of the machine."""

import subprocess
import sys
from pathlib import Path
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


@pytest.mark.fault(
    "records",
    "the package is installed inside another project's repository",
    "no commit is recorded, and never that project's",
)
@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_the_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: bool
) -> None:
    file = tmp_path / "a folder" / "kvquant" / "runtime" / "provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("")

    def git(*args: str) -> str:
        who = ("-c", "user.name=n", "-c", "user.email=n@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init")
    if tracked:
        git("add", "-A")
    git("commit", "--allow-empty", "-m", "of the project around it")
    monkeypatch.delenv("KVQUANT_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "_FILE", file)
    found = provenance._software.__wrapped__()
    assert found["commit"] == (git("rev-parse", "HEAD") if tracked else None)
    assert found["dirty"] == (False if tracked else None)


def test_a_machine_without_nvml_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert provenance._gpus() == []
    assert provenance.device_name() == "cpu"
