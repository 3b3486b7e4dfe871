"""A published study and a small repository around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.study.config import Study
from tests.support.reproductions import published_study
from tests.support.studies import study_of

CITATION = """\
title: "kvquant: measured"
version: 1.2.3
license: Apache-2.0
date-released: 2026-01-02
authors: [{family-names: Curie, given-names: Maria}, {name: A group}]
keywords: [kv-cache]
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study whose records lie in `published` below the test's folder."""
    return published_study(study_of(data_dir="/some/where", title="A study"), tmp_path)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with what an archive takes from the repository."""
    folder = tmp_path / "repository"
    (folder / "envs").mkdir(parents=True)
    (folder / "CITATION.cff").write_text(CITATION)
    for name in ("LICENSE", "requirements.lock", "envs/library.yaml", "envs/README.md"):
        (folder / name).write_text(f"{name}\n")
    return folder
