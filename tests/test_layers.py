"""The folders of `kvquant/` are layers: imports point downward only (docs/module-map.md)."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.imports import imported_names

LOOSE = {"__init__.py", "__main__.py", "cli.py", "errors.py"}
TORCH_FREE = (
    *("study", "runtime", "analysis.figure_list", "analysis.report", "cli", "errors"),
    *("analysis.explorer.view_list", "analysis.explorer.options"),
)


@pytest.fixture(scope="module")
def levels(root: Path) -> dict[str, int]:
    """The level of each folder and loose module, as the module map has them."""
    folders = runpy.run_path(str(root / "docs/module_map.py"))["LEVELS"]
    order = [("errors",), *reversed(folders), ("cli",), ("__main__",)]
    return {name: level for level, names in enumerate(order) for name in names}


@pytest.fixture(scope="module")
def modules(root: Path) -> dict[str, Path]:
    """The files of all modules by their dotted names."""
    files = sorted((root / "kvquant").rglob("*.py"))
    return {".".join(f.relative_to(root).with_suffix("").parts): f for f in files}


def _room(dotted: str) -> str:
    """The folder or loose module of a dotted name; "" for the package itself."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_only_the_front_door_lies_loose(root: Path, levels: dict[str, int]) -> None:
    assert {file.name for file in (root / "kvquant").glob("*.py")} == LOOSE
    folders = {f.name for f in (root / "kvquant").iterdir() if (f / "__init__.py").exists()}
    assert folders | {"errors", "cli", "__main__"} == set(levels)


def test_imports_point_downward(modules: dict[str, Path], levels: dict[str, int]) -> None:
    upward = []
    for module, file in modules.items():
        room = _room(module)
        if room == "__init__":
            continue  # the front door imports lazily whatever it offers
        for name in imported_names(file):
            if name.split(".")[0] != "kvquant" or name in ("kvquant", "kvquant.__version__"):
                continue
            other = _room(name)
            if other != room and levels[other] >= levels[room]:
                upward.append(f"{module} imports {name}")
    assert not upward


def test_no_two_modules_import_each_other(modules: dict[str, Path]) -> None:
    """Imports for types alone count, too: a circle of them is a circle for the reader."""
    graph = {name: modules.keys() & set(imported_names(file)) for name, file in modules.items()}
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
