"""What tests of the explorer share."""

from __future__ import annotations

import pytest

from tests.support.measured import Measured, measure


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A small study, mostly measured."""
    return measure(tmp_path_factory.mktemp("explored"))
