"""The task files of the pinned lm-eval package, read without importing its task manager."""

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from kvquant.errors import UserError

PINNED = "0.4.13"


class _Lenient(yaml.SafeLoader):
    """Reads `!function module.name` as that text."""


_Lenient.add_constructor("!function", lambda loader, node: str(node.value))


@functools.cache
def task_folder(package: str) -> Path:
    """The folder of a package of tasks such as "lm_eval.tasks.ruler".

    Raises:
        UserError: Another version of lm-eval is installed than the one that results are from.
    """
    if version("lm-eval") != PINNED:
        raise UserError(f"lm-eval: version {version('lm-eval')} is installed, {PINNED} is needed")
    parent, _, folder = package.rpartition(".")
    spec = importlib.util.find_spec(parent)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / folder


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A task file with the files it includes."""
    raw = yaml.load((folder / name).read_text(encoding="utf-8"), Loader=_Lenient)
    return {**_read(folder, raw.pop("include")), **raw} if "include" in raw else raw


@functools.cache
def task_files(package: str) -> tuple[dict[str, Any], ...]:
    """Every task file of a package, sorted by file name."""
    folder = task_folder(package)
    return tuple(_read(folder, file.name) for file in sorted(folder.glob("*.yaml")))
