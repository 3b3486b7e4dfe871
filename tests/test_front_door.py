"""`import kvquant`: the public classes, imported when they are first used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvquant


@pytest.mark.parametrize("name", kvquant.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(kvquant, name).__name__ == name
    assert name in dir(kvquant)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvquant.nothing  # noqa: B018


def test_importing_it_costs_no_torch(root: Path) -> None:
    code = "import sys, kvquant; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
