"""Which extra brings a package that is missing."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from kvquant import cli
from kvquant.runtime import extras

# Imports at which a library without extras must not fail, and the packages that it then lacks.
LIGHT = """
import sys

sys.modules.update(dict.fromkeys({names!r}))  # as if they were not installed
import kvquant
for name in kvquant.__all__:
    getattr(kvquant, name)
import kvquant.schemes.registry
"""


def packages_of(extra: str) -> set[str]:
    """The modules that an extra of the installed package brings."""
    lines = [line for line in metadata.requires("kvquant") or [] if f"'{extra}'" in line]
    return {re.split(r"[^A-Za-z0-9_-]", line)[0].replace("-", "_") for line in lines}


def test_the_metadata_tells_the_extra() -> None:
    lines = ["torch>=2.9", "lm-eval==0.4.13 ; extra == 'workflow'", 'hqq>=0.2; extra == "peers"']
    assert extras.extra_of("lm_eval.tasks", lines) == "workflow"
    assert extras.extra_of("hqq", lines) == "peers"
    assert extras.extra_of("torch", lines) is extras.extra_of("lm", lines) is None


def test_public_names_need_no_extra() -> None:
    """In a process where no package of the workflow can be imported."""
    names = packages_of("workflow")
    assert {"pandas", "snakemake", "lm_eval", "gguf", "codecarbon"} <= names
    subprocess.run([sys.executable, "-c", LIGHT.format(names=names)], check=True)


def test_a_verb_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def imported(name: str) -> Any:
        if name == "kvquant.analysis.collect":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return importlib.import_module(name)

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=imported))
    words = [
        "aggregate",
        "--study",
        "s",
        "--results",
        "r",
        "--out-dir",
        "o",
        "--device-name",
        "cpu",
    ]
    assert cli.main(words) == 2
    told = capsys.readouterr().err.strip()
    assert told == "kvquant: error: pandas: is not installed: pip install 'kvquant[workflow]'"


def test_other_missing_modules_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str) -> Any:
        if name == "kvquant.analysis.collect":
            raise ModuleNotFoundError("No module named 'kvquant.lost'", name="kvquant.lost")
        return importlib.import_module(name)

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=imported))
    with pytest.raises(ModuleNotFoundError):
        cli.main(
            [
                "aggregate",
                "--study",
                "s",
                "--results",
                "r",
                "--out-dir",
                "o",
                "--device-name",
                "cpu",
            ]
        )
