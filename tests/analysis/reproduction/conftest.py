"""A study whose published records were measured again with the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvquant.study.config import Study
from tests.support.reproductions import published_study
from tests.support.studies import study_of


@pytest.fixture(scope="package")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """The study, and the folder of its results and of what is published; not to be changed."""
    folder = tmp_path_factory.mktemp("reproduced")
    return published_study(study_of(), folder), folder


@pytest.fixture
def study(first: tuple[Study, Path]) -> Study:
    """The study, which names its published records."""
    return first[0]


@pytest.fixture
def own(first: tuple[Study, Path], tmp_path: Path) -> Path:
    """A copy of the results, which a test may change."""
    return Path(shutil.copytree(first[1] / "first", tmp_path / "own"))
