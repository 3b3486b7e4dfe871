"""Writes the tables of docs/reliability.md from the tests that inject the faults.

A test of a fault carries `@pytest.mark.fault("area", "what is injected", "what happens")`. Tests
are read, not run, so `python docs/faults.py` needs no environment. A test checks the page.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/reliability.md"
START = "<!-- Written by `python docs/faults.py` from the tests: edit the marks there. -->"
AREAS = {
    "files": "Files and formats",
    "custody": "Inputs that changed",
    "records": "Records and tables",
    "library": "The cache in a model's hands",
    "evaluation": "Evaluation",
    "statistics": "Statistics and claims",
    "devices": "Energy and devices",
    "workflow": "Workflow and schedulers",
    "security": "Security",
}


def _marks(file: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yields (area, injected, outcome, test) of every marked test of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                words = [ast.literal_eval(word) for word in mark.args]
                if len(words) != 3 or words[0] not in AREAS:
                    raise SystemExit(f"{file}: {node.name}: fault(area, injected, outcome)")
                test = f"{file.relative_to(ROOT / 'tests')}::{node.name}"
                yield words[0], words[1], words[2], test


def table() -> str:
    """Returns the tables, with one section per area and rows in the order of the files."""
    rows: dict[str, list[tuple[str, str, str]]] = {area: [] for area in AREAS}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for area, *row in _marks(file):
            rows[area].append((row[0], row[1], row[2]))
    lines = []
    for area, title in AREAS.items():
        if not rows[area]:
            continue
        lines += [f"### {title}", "", "| injected | what happens | test |", "|---|---|---|"]
        lines += [f"| {injected} | {then} | `{test}` |" for injected, then, test in rows[area]]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """Returns the whole page with its tables written anew."""
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{head}{START}\n\n{table().rstrip()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
