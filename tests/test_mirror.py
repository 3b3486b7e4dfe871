"""The tests have the package's shape: every module has a file of tests or is named in one.

What several files of tests share is in `tests.support`, never in another file of tests.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.imports import imported_names

ALSO = re.compile(r"Also covers: ([\w., \n]+?)\.(?:\n|$)")


def _modules(root: Path) -> set[str]:
    """All modules but `__init__`, as dotted names below the package."""
    package = root / "kvquant"
    files = (f.relative_to(package).with_suffix("") for f in package.rglob("*.py"))
    return {".".join(f.parts) for f in files if f.name != "__init__"}


def _test_files(root: Path) -> list[Path]:
    return sorted((root / "tests").rglob("test_*.py"))


def _named(root: Path) -> dict[str, list[str]]:
    """Modules that a file of tests names as also covered, with the files that do."""
    found: dict[str, list[str]] = {}
    for file in _test_files(root):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        for names in ALSO.findall(docstring):
            for name in re.split(r",\s+", names):
                found.setdefault(name, []).append(str(file.relative_to(root)))
    return found


def test_every_module_has_a_file_of_tests_or_is_named_in_one(root: Path) -> None:
    tests = root / "tests"
    own = {
        ".".join((*file.relative_to(tests).parent.parts, file.stem.removeprefix("test_")))
        for file in _test_files(root)
    }
    missing = _modules(root) - own - _named(root).keys()
    assert not missing, (
        f"{sorted(missing)}: give each a file tests/FOLDER/test_NAME.py, or name it in the "
        "docstring of the file that tests it: 'Also covers: FOLDER.NAME.'"
    )


def test_what_is_named_is_a_module_without_a_file_of_its_own(root: Path) -> None:
    modules = _modules(root)
    for name, files in _named(root).items():
        assert name in modules, f"{files}: kvquant.{name} is no module"
        *folders, last = name.split(".")
        own = root.joinpath("tests", *folders, f"test_{last}.py")
        assert not own.exists(), f"{files}: {name} has its own {own.relative_to(root)}"


def test_no_test_imports_another(root: Path) -> None:
    for file in sorted((root / "tests").rglob("*.py")):
        found = {
            name
            for name in imported_names(file)
            if name.split(".")[0] == "tests" and any(p.startswith("test_") for p in name.split("."))
        }
        assert not found, f"{file.relative_to(root)}: move what it shares to tests/support: {found}"
