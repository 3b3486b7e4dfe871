"""The other studies of which a paper speaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.study.companions import published_sums
from kvquant.study.config import load_study


def test_every_companion_of_a_committed_study_has_published_records(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    found = load_study(root / "config/config.yaml").companions
    assert found and all(Path(published_sums(file)).is_file() for file in found.values())


def test_a_companion_without_them_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("study: other\n")
    with pytest.raises(UserError, match=rf"companions: {file}: has no published records"):
        published_sums(str(file))
    with pytest.raises(UserError, match="companions"):
        published_sums(str(tmp_path / "none.yaml"))
