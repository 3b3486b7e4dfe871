"""`kvquant doctor`: exit statuses, screen and JSON; a broken driver or package ends no screen.

Also covers: diagnosis.doctor_screen, diagnosis.gpu_probe.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvquant.cli import main
from kvquant.diagnosis import doctor, gpu_checks, model_facts
from kvquant.diagnosis.doctor_screen import show
from kvquant.diagnosis.screen import Screen

SAID = """
import json
for name in ("torch", "driver", "GPU", "NVRTC", "Triton", "energy"):
    state = "warning" if name == "GPU" else "ok"
    print(json.dumps({"begins": name}))
    print(json.dumps({"section": "GPU", "name": name, "state": state, "found": "x", "fix": "",
                      "needed": False}))
"""
CRASHED = 'import os; print(\'{"begins": "torch"}\', flush=True); os.abort()'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe says what it would say, without importing torch."""
    made = doctor.Probe
    monkeypatch.setattr(doctor, "Probe", lambda: made((sys.executable, "-c", SAID)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # which --offline sets, and the test takes back


def found(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the JSON of a call."""
    status = main(["doctor", "--offline", "--json", *words])
    return status, json.loads(capsys.readouterr().out)


def test_a_machine_without_a_gpu_can_run_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, raw = found(capsys)
    assert (status, raw["status"], raw["schema"], raw["device"]) == (0, 0, 1, "cpu")
    assert (raw["model"], raw["kernels"]) == (None, [])
    page = (root / "docs/cli.md").read_text(encoding="utf-8").split("## `doctor --json`")[1]
    assert all(f"`{key}`" in page for key in (*raw, *raw["checks"][0]))
    names = [check["name"] for check in raw["checks"]]
    assert len(names) == len(set(names)) and {"python", "torch", "GPU", "Slurm"} <= set(names)
    for check in raw["checks"]:
        assert set(check) == {"section", "name", "state", "found", "fix", "needed"}
        assert check["state"] in ("ok", "warning", "missing", "skipped")
        assert "\n" not in check["found"] + check["fix"]


def test_the_real_probe_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "Probe", gpu_checks.Probe)
    status, raw = found(capsys)
    rows = {check["name"]: check for check in raw["checks"]}
    assert status == 0 and rows["torch"]["state"] in ("ok", "warning")
    assert not any("crash" in check["found"] for check in raw["checks"])


def test_a_model_gets_layers_and_kernels(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, raw = found(capsys, "--model", str(configs / "gemma2"))
    assert status == 0 and raw["model"]["family"] == "Gemma 2"
    layers = raw["model"]["layers"]
    assert [(one["kind"], one["window"]) for one in layers] == [("full", None), ("sliding", 100)]
    kernels = {row["scheme"]: row for row in raw["kernels"]}
    assert kernels["nuq3-1pct"]["operations"]["pack"]["backend"] == "pytorch"
    assert len(kernels) >= 16
    assert main(["doctor", "--offline", "--model", str(configs / "gemma2")]) == 0
    shown = capsys.readouterr().out
    assert "2 layers of 100 tokens, kept in 16 bits" in shown
    assert "1: device: cpu is not a GPU" in shown and "\x1b" not in shown
    assert shown.rstrip().splitlines()[-1].startswith("kvquant can run here, on the CPU")


@pytest.mark.parametrize(
    ("name", "state", "told"),
    [
        ("small", "ok", "attention by pytorch, not cuda: device: "),
        ("gemma2", "missing", "no caps of scores in 8-bit attention"),
    ],
)
def test_who_would_attend_in_8_bits(
    name: str, state: str, told: str, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, raw = found(capsys, "--model", str(configs / name))
    row = next(check for check in raw["checks"] if check["name"] == "8-bit prompts")
    assert status == 0 and row["state"] == state and row["found"].startswith(told) and row["fix"]


@pytest.mark.parametrize("name", ["qwen3-next", "starcoder2", "t5"])
def test_a_refused_model_is_exit_status_1(
    name: str, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, raw = found(capsys, "--model", str(configs / name))
    assert status == raw["status"] == 1 and raw["model"]["refused"] and raw["kernels"] == []
    assert any(check["name"] == "refused" and check["fix"] for check in raw["checks"])


def test_an_asked_scheme_that_cannot_run_is_exit_status_1(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", str(configs / "small"), "--scheme")
    status, raw = found(capsys, *words, "kivi")
    assert status == 0 and [row["scheme"] for row in raw["kernels"]] == ["kivi"]
    status, raw = found(capsys, *words, "kind=cq,bits=0.5,channels=16")
    assert status == 0
    status, raw = found(capsys, *words, "kind=kvarn,bits=4,tile=16")
    assert status == 0 and raw["kernels"][0]["state"] == "ok"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scheme", "kivi"], "--scheme: which kernels it gets depends on the model"),
        (["--model", "m", "--scheme", "kiwi"], "unknown scheme 'kiwi'"),
        (["--model", "./nowhere"], "--model: ./nowhere is no folder with a config.json"),
        (["--data-dir", "nowhere"], "--data-dir: no such folder: nowhere"),
    ],
)
def test_wrong_input_is_exit_status_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--offline", *words]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out


def test_a_data_folder_of_nobody_takes_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVQUANT_DATA_DIR", "~nobody-of-this-name/data")
    assert main(["doctor", "--offline"]) == 2
    said = capsys.readouterr().err
    assert "KVQUANT_DATA_DIR: '~nobody-of-this-name/data': no home folder" in said
    assert said.count("\n") == 1


def test_broken_torch_and_transformers_are_rows(
    configs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: Any) -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "Probe", lambda: gpu_checks.Probe((sys.executable, "-c", CRASHED)))
    monkeypatch.setattr(model_facts, "read_model", broken)
    status, raw = found(capsys, "--model", str(configs / "small"))
    rows = {check["name"]: check for check in raw["checks"]}
    assert status == 1 and "SIGABRT" in rows["torch"]["found"]
    assert "libcudart" in rows[str(configs / "small")]["found"]
    assert main(["doctor", "--offline"]) == 1
    assert "What was asked for cannot run here: software torch" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_of_a_terminal(
    width: int, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, raw = found(capsys, "--model", str(configs / "gemma2"))
    out = io.StringIO()
    show(raw, Screen(Console(file=out, force_terminal=True, width=width, color_system=None)))
    lines = out.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    shown = out.getvalue()
    for row in raw["kernels"]:
        assert row["scheme"] in shown
    assert "decode step" in shown and "because" in shown
