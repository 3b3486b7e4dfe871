"""Writes the tables of docs/model-features.md from the tests that show them.

A test carries `@pytest.mark.feature("heading", "family")`, or `@pytest.mark.refused("what is
refused", "what the error names and the fix")`. `{name}` in these words is a parameter of the test,
and the family is by default its parameter `family`. So a cell is filled exactly where a test runs.
`python docs/model_features.py` reads the marks without running the tests, and a test checks the
page.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvquant.study.model_families import MODEL_FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/model-features.md"
START = "<!-- Written by `python docs/model_features.py` from the tests: edit the marks there. -->"
WINDOWS = "windows"  # in a family's name behind a +
TESTS = ("families", "model_features", "hybrid", "transformers_behaviour", "obstacles",
         "prefill_quant", "loading", "value_rotation", "tensor_parallel",
         "prompt_attention")  # fmt: skip


def _marked(file: Path) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """Yields (mark, parameters, test) for every marked test of a file and each of its cases."""
    spec = importlib.util.spec_from_file_location(f"marks_of_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, test in vars(module).items():
        marks = getattr(test, "pytestmark", [])
        if not name.startswith("test_") or not isinstance(marks, list):
            continue
        for mark in marks:
            if mark.name in ("feature", "refused"):
                where = f"{file.relative_to(ROOT / 'tests')}::{name}"
                yield from ((mark, case, where) for case in _cases(marks))


def _cases(marks: list[Any]) -> Iterator[dict[str, Any]]:
    """Yields the parameters of every case of a test."""
    axes = []
    for mark in marks:
        if mark.name != "parametrize":
            continue
        names = mark.args[0]
        several = not isinstance(names, str)
        axes.append([
            dict(zip(names, one, strict=True)) if several else {names: one} for one in mark.args[1]
        ])  # fmt: skip
    for parts in itertools.product(*axes):
        yield {name: value for part in parts for name, value in part.items()}


def _label(key: str) -> str:
    """Returns the name of a row: that of a family, and of one whose layers have windows."""
    name, _, windows = key.partition("+")
    found = [f for f in MODEL_FAMILIES.values() if f.name == name or f.name == f"{name}_text"]
    return found[0].label + (", sliding windows" if windows else "")


def tables() -> str:
    """Returns the table of families and features, what shows it, and the table of refusals."""
    cells: dict[str, set[str]] = {}
    shown: dict[str, set[str]] = {}
    refused: dict[tuple[str, str], list[str]] = {}
    for name in TESTS:
        for mark, case, where in _marked(ROOT / f"tests/models/test_{name}.py"):
            words = [word.format(**case) for word in mark.args]
            if mark.name == "refused":
                found = refused.setdefault((words[1], where), [])
                found += [] if words[0] in found else [words[0]]
                continue
            key = words[1] if len(words) > 1 else str(case["family"])
            cells.setdefault(words[0], set()).add(key.partition("-")[0])  # a variant is its family
            shown.setdefault(words[0], set()).add(where)
    keys = {key for column in cells.values() for key in column}
    plain = list(MODEL_FAMILIES)
    others = sorted(keys - set(plain), key=_label)
    numbers = {heading: str(i) for i, heading in enumerate(cells, 1)}
    heads = ["model family", *numbers.values()]
    lines = ["### Families and features", "", "| | feature | test |", "|---|---|---|"]
    for heading, number in numbers.items():
        tests = ", ".join(f"`{test}`" for test in sorted(shown[heading]))
        lines.append(f"| {number} | {heading} | {tests} |")
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key in [*plain, *others]:
        row = ["works" if key in column else "not tested" for column in cells.values()]
        lines.append(f"| {' | '.join([_label(key), *row])} |")
    lines += ["", "### Refused", "", "| what | the error names | test |", "|---|---|---|"]
    for (answer, test), what in refused.items():
        lines.append(f"| {'; '.join(what)} | {answer} | `{test}` |")
    return "\n".join(lines)


def page() -> str:
    """Returns the whole page with its tables written anew."""
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{head}{START}\n\n{tables()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
