"""The grid that is shown before a study starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.cli import main
from kvquant.config import load_study
from kvquant.grid import expected_gpu_hours, grid_lines, grid_rows


def test_rows_count_what_the_study_lists(root: Path) -> None:
    study = load_study(root / "config/smoke.yaml")
    rows = {stage: (jobs, results) for stage, jobs, results, _ in grid_rows(study)}
    schemes, seeds = len(study.schemes), len(study.seeds)
    for task in study.tasks:
        assert rows[f"evaluate {task}"] == (schemes, schemes * seeds)
    assert rows["throughput"][0] == len(study.throughput_cells())
    assert rows["energy"][0] == len(study.energy_cells())


def test_hours_are_told_for_gpu_studies_only(root: Path) -> None:
    assert expected_gpu_hours(load_study(root / "config/demo.yaml")) == 0
    paper = load_study(root / "config/config.yaml")
    assert expected_gpu_hours(paper) > 1
    assert "GPU-hours" in grid_lines(paper)[-1]


def test_the_command_names_every_task_scheme_and_seed(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file = root / "config/demo.yaml"
    assert main(["grid", "--study", str(file)]) == 0
    text, study = capsys.readouterr().out, load_study(file)
    for name in [*study.tasks, *study.schemes, *study.models, *map(str, study.seeds)]:
        assert name in text
