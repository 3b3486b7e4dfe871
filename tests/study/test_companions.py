"""The other studies of which a paper speaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.study.companions import companion_files, published_sums
from kvquant.study.config import load_study


def test_companions_of_a_committed_study_name_published_records(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of which none are published yet are complete studies all the same."""
    monkeypatch.chdir(root)
    for file in load_study(root / "config/config.yaml").companions.values():
        folder = load_study(file).published
        assert folder is not None
        there = Path(folder).is_dir()
        assert published_sums(file) == ([str(Path(folder) / "SHA256SUMS")] if there else [])
    study = load_study(root / "config/config.yaml")
    assert set(study.companions.values()) <= set(companion_files(study))


def test_a_companion_that_names_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("study: other\n")
    with pytest.raises(UserError, match=rf"companions: {file}: has no published records"):
        published_sums(str(file))
    with pytest.raises(UserError, match="companions"):
        published_sums(str(tmp_path / "none.yaml"))
