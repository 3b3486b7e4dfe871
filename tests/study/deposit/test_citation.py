"""CITATION.cff says what pyproject.toml says, and is read strictly."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.study.deposit.citation import read_citation


def test_it_is_in_step_with_the_package(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    found = read_citation(root)
    assert found.version == project["version"] and found.license == project["license"]
    assert list(found.authors) == [author["name"] for author in project["authors"]]
    assert list(found.keywords) == project["keywords"]
    assert found.title.startswith(f"{project['name']}: ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1", "", "version: is missing"),
        ("2026-01-02", "January", "date-released: must be YYYY-MM-DD"),
        ("name: N", "alias: N", "has neither `name` nor `family-names`"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = "title: T\nversion: 1\nlicense: MIT\ndate-released: 2026-01-02\nauthors:\n  - name: N\n"
    (tmp_path / "CITATION.cff").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_citation(tmp_path)


def test_a_person_has_the_family_name_first(tmp_path: Path) -> None:
    text = "title: T\nversion: 1\nlicense: MIT\ndate-released: 2026-01-02\nauthors:\n"
    names = "  - {family-names: Curie, given-names: Maria}\n"
    (tmp_path / "CITATION.cff").write_text(text + names)
    assert read_citation(tmp_path).authors == ("Curie, Maria",)
