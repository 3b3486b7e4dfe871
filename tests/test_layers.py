"""The folders of `kvquant/` are layers: imports point downward only (docs/module-map.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the bottom up. Folders of one line may not import one another.
LAYERS = (
    ("errors",),
    ("formats",),
    ("energy",),
    ("runtime", "study"),
    ("fetch", "kernels"),
    ("analysis", "quantization"),
    ("cache",),
    ("schemes",),
    ("models",),
    ("calibration",),
    ("evaluation", "benchmarks"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LOOSE = {"__init__.py", "__main__.py", "cli.py", "errors.py"}
TORCH_FREE = ("study", "runtime", "analysis.figure_list", "analysis.report", "cli", "errors")


def _modules(root: Path) -> list[Path]:
    return sorted((root / "kvquant").rglob("*.py"))


def _room(dotted: str) -> str:
    """The folder or loose module of a dotted name; "" for the package itself."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def _imports(file: Path) -> Iterator[str]:
    """Every module of kvquant that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "kvquant")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvquant":
            assert node.module is not None
            if node.module == "kvquant":
                names = {a.name for a in node.names} - {"__version__"}
                yield from (f"kvquant.{name}" for name in names)
            else:
                yield node.module


def test_only_the_front_door_lies_loose(root: Path) -> None:
    assert {file.name for file in (root / "kvquant").glob("*.py")} == LOOSE
    folders = {f.name for f in (root / "kvquant").iterdir() if (f / "__init__.py").exists()}
    assert folders | {"errors", "cli", "__main__"} == set(LEVEL)


def test_imports_point_downward(root: Path) -> None:
    upward = []
    for file in _modules(root):
        parts = file.relative_to(root).with_suffix("").parts
        room = _room(".".join(parts))
        if room == "__init__":
            continue  # the front door imports lazily whatever it offers
        for name in _imports(file):
            other = _room(name)
            if other != room and LEVEL[other] >= LEVEL[room]:
                upward.append(f"{file.relative_to(root)} imports {name}")
    assert not upward


def _module_imports(root: Path) -> dict[str, set[str]]:
    files = {".".join(f.relative_to(root).with_suffix("").parts): f for f in _modules(root)}
    found = {}
    for name, file in files.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvquant"):
                inside = {f"{node.module}.{a.name}" for a in node.names} & files.keys()
                wanted |= inside or ({node.module or ""} & files.keys())
        found[name] = wanted
    return found


def test_no_two_modules_import_each_other(root: Path) -> None:
    """Imports for types alone count, too: a circle of them is a circle for the reader."""
    graph = _module_imports(root)
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            pytest.fail("a circle: " + " -> ".join((*above[above.index(name) :], name)))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_what_the_workflow_imports_is_torch_free(root: Path) -> None:
    names = []
    for part in TORCH_FREE:
        path = root / "kvquant" / part.replace(".", "/")
        files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        names += [".".join(f.relative_to(root).with_suffix("").parts) for f in files]
    code = (
        f"import sys, importlib; [importlib.import_module(n) for n in {names!r}]\n"
        "heavy = {'torch', 'transformers', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
