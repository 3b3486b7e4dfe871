"""The probe of GPUs: a step that fails or ends the process is a row, and never ends the verb."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.diagnosis import gpu_probe
from kvquant.diagnosis.gpu_checks import Probe
from tests.support.pretend_machine import pretend_machine


def probed(code: str, seconds: float = 60.0) -> dict[str, Any]:
    """The checks of a process that runs other code in place of the probe."""
    command = (sys.executable, "-c", textwrap.dedent(code))
    return {check.name: check for check in Probe(command, seconds).checks()}


def said(name: str) -> str:
    """Code that prints what the probe prints of a step that went well."""
    begins = json.dumps({"begins": name})
    check = {
        "section": "GPU",
        "name": name,
        "state": "ok",
        "found": "x",
        "fix": "",
        "needed": False,
    }
    return f"print({begins!r}); print({json.dumps(check)!r}, flush=True)"


def test_a_crash_of_the_driver_is_one_row() -> None:
    code = f"import os, signal\n{said('torch')}\n{said('driver')}\n"
    code += """print('{"begins": "GPU"}', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"""
    found = probed(code)
    assert list(found) == list(gpu_probe.STEPS)
    assert found["torch"].state == found["driver"].state == "ok"
    assert found["GPU"].state == "missing" and "SIGSEGV" in found["GPU"].found
    assert found["GPU"].fix and {found[n].state for n in ("NVRTC", "Triton")} == {"skipped"}
    assert not any(check.fails for check in found.values())


def test_a_process_that_hangs_or_says_nothing_is_given_up() -> None:
    found = probed(f"import time\n{said('torch')}\ntime.sleep(60)", 2.0)
    assert found["torch"].state == "ok" and found["driver"].state == "skipped"
    found = probed("import sys; sys.exit('no such module')")
    assert found["torch"].fails and "no such module" in found["torch"].found


def test_steps_that_raise_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("libcuda.so: wrong version\nmore")

    monkeypatch.setattr(gpu_probe, "STEPS", {"torch": broken, "GPU": gpu_probe._gpus})
    lines: list[dict[str, Any]] = []
    gpu_probe.run_steps(lines.append)
    assert [line.get("begins", line.get("name")) for line in lines] == ["torch"] * 2 + ["GPU"] * 2
    assert (
        lines[1]["state"] == "missing" and lines[1]["found"] == "OSError: libcuda.so: wrong version"
    )


def test_energy_and_driver_of_a_machine_with_gpus(tmp_path: Path) -> None:
    with pretend_machine(tmp_path):
        state, found, _ = gpu_probe._energy()
        assert state == "ok" and "energy counter" in found
        state, found, _ = gpu_probe._driver()
        assert state == "ok" and "2 GPU(s)" in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_looked_at_whole() -> None:
    found = {check.name: check for check in Probe().checks()}
    assert {found[name].state for name in ("torch", "driver", "GPU", "NVRTC")} == {"ok"}, found
    assert found["Triton"].found.count("target cuda:") == 1
    assert "missing" not in {check.state for check in found.values()}, found
