"""config/README.md and docs/library.md show what is registered."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["config/README.md", "docs/library.md"])
def test_tables_are_those_of_the_registrations(name: str, root: Path) -> None:
    file = root / name
    written = runpy.run_path(str(root / "docs/tables.py"))["page"](file)
    assert file.read_text(encoding="utf-8") == written, "run `python docs/tables.py`"
