"""Reads which modules a Python file imports, without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def imported_names(file: Path) -> Iterator[str]:
    """Yields every module that a file imports, wherever in it, and every name taken from one.

    `from a import b` gives "a" and "a.b", as `b` may be a module.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
