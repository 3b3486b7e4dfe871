"""What the paper shows of other published studies."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from kvquant.analysis import companion
from kvquant.errors import UserError
from kvquant.study.config import load_study


def run(study: Path, out: Path) -> None:
    companion.run(argparse.Namespace(study=str(study), out_dir=out))


def test_numbers_tables_and_figures_of_published_records(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a study whose evaluations are not measured: it has whole jobs alone."""
    monkeypatch.chdir(root)
    run(root / "config/two_gpus.yaml", tmp_path)
    numbers = (tmp_path / "numbers.tex").read_text(encoding="utf-8")
    assert r"\kvnumber{jobs.13b-mha-2-gpus.allocated-3.step}{" in numbers
    assert r"{allocated-3.bits}" not in numbers  # as no evaluation is published
    jobs = (tmp_path / "tables/jobs.tex").read_text(encoding="utf-8")
    assert r"\toprule" in jobs and "% from 2 records " in jobs
    assert "Nothing of this kind" in (tmp_path / "tables/summary.tex").read_text(encoding="utf-8")
    assert (tmp_path / "figures/pareto.pdf").read_bytes().startswith(b"%PDF")


def test_a_study_without_published_records_has_facts_alone(root: Path, tmp_path: Path) -> None:
    """One that names none is refused."""
    raw = load_study(root / "config/two_gpus.yaml").model_dump(mode="json")
    file, out = tmp_path / "study.json", tmp_path / "out"
    file.write_text(json.dumps(raw | {"published": None}), encoding="utf-8")
    with pytest.raises(UserError, match="'two-gpus' names no published records"):
        run(file, out)
    assert not out.exists()
    file.write_text(json.dumps(raw | {"published": str(tmp_path / "none")}), encoding="utf-8")
    run(file, out)
    numbers = (out / "numbers.tex").read_text(encoding="utf-8")
    assert r"\kvnumber{records}{0}" in numbers and "{jobs." not in numbers
    assert "measures no whole jobs" in (out / "tables/jobs.tex").read_text(encoding="utf-8")
