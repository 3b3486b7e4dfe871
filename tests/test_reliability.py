"""The page of faults is what the tests say."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_the_page_of_faults_is_up_to_date(root: Path) -> None:
    written = runpy.run_path(str(root / "docs/faults.py"))["page"]()
    assert (root / "docs/reliability.md").read_text() == written, "run `python docs/faults.py`"
    assert written.count("::test_") > 100
