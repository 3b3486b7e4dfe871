"""What tests of figures share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def _figures_are_closed() -> Iterator[None]:
    """Matplotlib keeps every figure until it is closed, and warns of more than 20."""
    yield
    plt.close("all")
