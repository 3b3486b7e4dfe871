"""Jobs that a killed run left in Slurm, with a stand-in for squeue."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant import slurm
from kvquant.errors import UserError


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A `squeue` first in PATH that runs `body`."""
    file = folder / "squeue"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_jobs_of_this_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = f"7|RUNNING|rule_evaluate_a|{tmp_path}\n8|PENDING|rule_energy_b|/elsewhere\n"
    rows += f"9|RUNNING|(null)|{tmp_path}"
    squeue(tmp_path, monkeypatch, f"printf '%s\\n' '{rows}'")
    assert slurm.leftovers(tmp_path) == [("7", "RUNNING", "evaluate_a")]
    with pytest.raises(UserError, match="scancel 7;") as caught:
        slurm.refuse_leftovers(tmp_path)
    assert "7 RUNNING evaluate_a" in str(caught.value)
    slurm.refuse_leftovers(tmp_path / "other")


def test_a_silent_controller_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "asked"
    squeue(tmp_path, monkeypatch, f"[ -e {flag} ] || {{ : >{flag}; exit 1; }}")
    assert slurm.leftovers(tmp_path, pause=0.01) == []
    squeue(tmp_path, monkeypatch, "echo unable to contact >&2; exit 1")
    with pytest.raises(UserError, match="no answer in 3 attempts: unable to contact"):
        slurm.leftovers(tmp_path, attempts=3, pause=0.01)
