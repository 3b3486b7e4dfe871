"""docs/module-map.md lists every module as it is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path


def test_the_module_map_is_that_of_the_code(root: Path) -> None:
    written = runpy.run_path(str(root / "docs/module_map.py"))["page"]()
    page = (root / "docs/module-map.md").read_text(encoding="utf-8")
    assert page == written, "run `python docs/module_map.py`"


def test_the_papers_names_lead_to_files(root: Path) -> None:
    page = (root / "docs/module-map.md").read_text(encoding="utf-8")
    names = page.split("## Names of the paper")[1].split("## The front door")[0]
    files = re.findall(r"`(\w+/\w+\.py)`", names)
    assert len(files) >= 8
    assert all((root / "kvquant" / file).is_file() for file in files)
