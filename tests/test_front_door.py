"""`import kvquant`: the public names, imported when they are first used."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import kvquant

ALIASES = {"load_quantized_model": "load"}


@pytest.mark.parametrize("name", kvquant.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(kvquant, name).__name__ == ALIASES.get(name, name)
    assert name in dir(kvquant)


@pytest.mark.parametrize("name", kvquant.__all__)
def test_public_names_are_documented_and_typed(name: str) -> None:
    """What a page of reference would show: sentences, each argument, and types."""
    found = getattr(kvquant, name)
    members = [found]
    if inspect.isclass(found):
        own = vars(found).items()
        members += [x for key, x in own if key[0] != "_" and inspect.isfunction(x)]
    for member in members:
        assert (inspect.getdoc(member) or "").split("\n")[0].endswith("."), member
        if not inspect.isfunction(member):
            continue
        signature = inspect.signature(member)
        assert signature.return_annotation is not inspect.Signature.empty, member
        for parameter in signature.parameters.values():
            typed = parameter.annotation is not inspect.Parameter.empty
            assert typed or parameter.name == "self", (member, parameter)
            # two arguments of one line are explained together where the function is short
            if member is found and name not in ("load_quantizer",):
                assert f"{parameter.name}:" in (member.__doc__ or ""), (name, parameter.name)


def test_type_checkers_see_every_public_name(root: Path) -> None:
    tree = ast.parse((root / "kvquant/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == kvquant.__all__
    for name, module in seen.items():
        assert module == f"kvquant.{kvquant._MODULES[name]}"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvquant.nothing  # noqa: B018


def test_importing_it_costs_no_torch(root: Path) -> None:
    code = "import sys, kvquant; kvquant.scheme_presets(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_the_page_names_everything(root: Path) -> None:
    page = (root / "docs/library.md").read_text(encoding="utf-8")
    assert [name for name in kvquant.__all__ if name not in page] == []
