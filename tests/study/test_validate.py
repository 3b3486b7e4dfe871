"""`kvquant study`: what is written is the same study, with every default filled in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvquant.cli import main
from kvquant.study.config import Study, digest, load_study


def test_written_study_is_the_same_study(root: Path, tmp_path: Path) -> None:
    source = root / "config/demo.yaml"
    out = tmp_path / "new/study.json"
    assert main(["study", "--study", str(source), "--out", str(out)]) == 0
    assert load_study(out) == load_study(source)
    assert digest(load_study(out)) == digest(load_study(source))
    assert json.loads(out.read_text())["statistics"]["alpha"] == 0.05


def test_mistake_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((root / "config/demo.yaml").read_text() + "sedes: [1]\n")
    assert main(["study", "--study", str(wrong), "--out", str(tmp_path / "s.json")]) == 2
    assert "sedes: unknown key" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_every_key_of_a_study_is_explained(root: Path) -> None:
    text = (root / "config/README.md").read_text()
    for key in Study.model_fields:
        assert f"`{key}`" in text, f"config/README.md does not explain {key}"
