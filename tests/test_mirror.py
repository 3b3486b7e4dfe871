"""The tests' own order: what tests share is in `tests.support`, not in another test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_imports_another(root: Path) -> None:
    for file in (root / "tests").rglob("*.py"):
        found = {
            name
            for name in _imports(file)
            if name.split(".")[0] == "tests" and any(p.startswith("test_") for p in name.split("."))
        }
        assert not found, f"{file.relative_to(root)}: move what it shares to tests/support: {found}"
