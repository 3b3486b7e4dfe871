"""config/README.md shows what is registered."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_tables_are_those_of_the_registrations(root: Path) -> None:
    written = runpy.run_path(str(root / "docs/tables.py"))["page"]()
    found = (root / "config/README.md").read_text(encoding="utf-8")
    assert found == written, "run `python docs/tables.py`"
