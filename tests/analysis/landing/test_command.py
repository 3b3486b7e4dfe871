"""The command that makes a study again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from kvquant.analysis.landing.command import study_command


def test_the_default_study_needs_no_file() -> None:
    assert study_command([], False, {}) == "snakemake --cores all"


def test_files_and_settings_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files: list[str | Path] = [tmp_path / "config/of mine.yaml", "/elsewhere/more.yaml"]
    given = {"data_dir": "/home/someone/data", "title": "two words", "pathvars": {"logs": "l"}}
    words = shlex.split(study_command(files, True, given))
    assert words[:3] == ["snakemake", "--cores", "all"]
    assert words[3:6] == ["--configfile", "config/of mine.yaml", "/elsewhere/more.yaml"]
    assert words[6:8] == ["--replace-workflow-config", "--config"]
    assert words[8:] == ["data_dir=FOLDER", "title=two words", 'pathvars={"logs": "l"}']
    assert "--replace" not in study_command(files, False, {})
