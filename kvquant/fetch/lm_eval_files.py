"""The task files of the pinned lm-eval package, read without importing its task manager.

That import takes seconds and is not needed for prompts or scores.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from kvquant.errors import UserError
from kvquant.formats.files import read_text

PINNED = "0.4.13"


class _Lenient(yaml.SafeLoader):
    """Loads YAML with `!function module.name` as a plain string."""


_Lenient.add_constructor("!function", lambda loader, node: str(node.value))


def check_version() -> None:
    """Refuses any version of lm-eval but the pinned one.

    Raises:
        UserError: Another version is installed.
    """
    if version("lm-eval") != PINNED:
        raise UserError(f"lm-eval: version {version('lm-eval')} is installed, {PINNED} is needed")


@functools.cache
def task_folder(package: str) -> Path:
    """Returns the folder of a package of tasks such as "lm_eval.tasks.ruler".

    Raises:
        UserError: Another version of lm-eval than the pinned one is installed.
    """
    check_version()
    parent, _, folder = package.rpartition(".")
    spec = importlib.util.find_spec(parent)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / folder


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Returns the content of a task file merged with the files that it includes."""
    raw = yaml.load(read_text(folder / name, "lm-eval", "install it again"), Loader=_Lenient)
    return {**_read(folder, raw.pop("include")), **raw} if "include" in raw else raw


@functools.cache
def task_files(package: str) -> tuple[dict[str, Any], ...]:
    """Returns the content of every task file of a package, sorted by file name."""
    folder = task_folder(package)
    return tuple(_read(folder, file.name) for file in sorted(folder.glob("*.yaml")))


def file_module(package: str, name: str) -> ModuleType:
    """Imports one file of a package of tasks as a private module, absent from `sys.modules`."""
    file = task_folder(package) / f"{name}.py"
    private = f"kvquant_{package}_{name}".replace(".", "_")
    spec = importlib.util.spec_from_file_location(private, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def without_manager() -> Iterator[None]:
    """Lets packages of tasks be imported without running `lm_eval.tasks` itself.

    Modules of `lm_eval.tasks` are removed from `sys.modules` afterwards, so that a later import
    gets the real package. The caller keeps the modules that it imported.
    """
    root = "lm_eval.tasks"
    if root in sys.modules:
        yield
        return
    bare = ModuleType(root)
    bare.__path__ = [str(task_folder(root))]
    sys.modules[root] = bare
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n == root or n.startswith(f"{root}.")]:
            del sys.modules[name]
