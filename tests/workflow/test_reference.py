"""The reference page of the workflow is what the rules and the typed configuration say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

EXPANDED = {"file", "table", "name"}  # filled in by the rule, no wildcards of its jobs


@pytest.fixture(scope="module")
def reference(root: Path) -> dict[str, Any]:
    """The functions of the script that writes the page."""
    return runpy.run_path(str(root / "docs/workflow_reference.py"))


def test_the_page_is_up_to_date(root: Path, reference: dict[str, Any]) -> None:
    written = reference["page"]()
    found = (root / "docs/workflow-reference.md").read_text()
    assert found == written, "run `python docs/workflow_reference.py`"
    links = set(re.findall(r"\(#([^)]+)\)", written))
    headings = re.findall(r"^#+ (.+)$", written, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
    assert len(links) > 20 and links <= anchors


def test_every_rule_and_wildcard_is_described(root: Path, reference: dict[str, Any]) -> None:
    rules, wildcards = reference["rules"](), reference["wildcards"]()
    texts = [file.read_text() for file in (root / "workflow").rglob("*") if file.is_file()]
    names = re.findall(r"^(?:use )?rule (?:\w+ as )?(\w+)", "\n".join(texts), re.M)
    assert {rule.name for rule in rules} == set(names)
    for rule in rules:
        assert rule.docstring, f"{rule.name} has no docstring"
        assert rule.outputs or not rule.verb, f"{rule.name} has no outputs"
        used = set(re.findall(r"\{(\w+)\}", " ".join(rule.outputs))) - EXPANDED
        assert used <= set(wildcards), rule.name
    assert all(wildcards.values()), "a wildcard has no comment beside its constraint"
