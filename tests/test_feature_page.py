"""The page of models and features is what the tests say."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_the_page_of_features_is_up_to_date(root: Path) -> None:
    written = runpy.run_path(str(root / "docs/model_features.py"))["page"]()
    found = (root / "docs/model-features.md").read_text(encoding="utf-8")
    assert found == written, "run `python docs/model_features.py`"
    assert written.count("| works ") > 300
