"""What the documentation site generates, and drawings, are those of the code."""

from __future__ import annotations

import importlib
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import kvquant
from kvquant.cli import VERBS


@pytest.fixture
def site(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of `docs/site`, which needs no mkdocs."""
    monkeypatch.syspath_prepend(str(root / "docs/site"))
    yield importlib.import_module
    for name in ("api_reference", "cli_reference", "outside_pages", "records_reference"):
        sys.modules.pop(name, None)


def test_every_verb_and_option_has_a_row(site: Any) -> None:
    reference = site("cli_reference")
    page = reference.page()
    for verb in VERBS:
        assert f"\n## kvquant {verb}" in page
    for name, parser in reference.parsers().items():
        section = page.split(f"\n## kvquant {name}\n")[1].split("\n## ")[0]
        for action in parser._actions:
            if action.dest != "help":
                assert all(f"`{flag}`" in section for flag in action.option_strings)
    assert "`kvquant capacity --model MODEL --memory MEMORY [options]`" in page
    assert "| `--windows` | `N` |" in page and "| `--memory` | `MEMORY` | required |" in page


def test_every_public_name_is_documented(site: Any) -> None:
    page = site("api_reference").page()
    for name in set(kvquant.__all__) - {"load_quantized_model"}:
        assert f"\n      heading: kvquant.{name}\n" in page


def test_every_record_is_documented(site: Any) -> None:
    page = site("records_reference").page()
    for path in ("eval/", "perf/", "energy/", "append/", "kernels/", "jobs/"):
        assert f"`{path}..." in page
    assert '| `protocol` | `"A" or "B"` |' in page
    assert "| `samples_sha256` | `str` |" in page


def test_links_of_the_repository_become_those_of_the_site(site: Any, root: Path) -> None:
    text = site("outside_pages").site_text
    assert text(root, "design.md", "[s](../config/README.md#keys)") == "[s](study-files.md#keys)"
    assert text(root, "study-files.md", "[w](../docs/workflow.md)") == "[w](workflow.md)"
    assert text(root, "index.md", "[r](../README.md#state)") == "[r](measured.md)"
    assert (
        text(root, "quality.md", "[q](../config/quality.yaml)") == "[q](files/config/quality.yaml)"
    )
    assert text(root, "library.md", "[e](../examples)") == "e"
    assert text(root, "x.md", "[a](https://a.org) [b](#here)") == "[a](https://a.org) [b](#here)"


def test_files_that_pages_link_to_are_part_of_the_site(site: Any, root: Path) -> None:
    files = site("outside_pages").linked_files(root, {"quality.md": "[q](../config/quality.yaml)"})
    assert files == {"files/config/quality.yaml": (root / "config/quality.yaml").read_bytes()}


def test_the_explorer_is_linked_where_it_was_made(site: Any, tmp_path: Path) -> None:
    pages = site("outside_pages")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/workflow.md").write_text("a\n## The explorer\nIt sorts.\n\n## Next\nb\n")
    without = pages._explorer(tmp_path)
    assert "`uv run snakemake -c2 explorer`" in without and "](" not in without
    made = tmp_path / pages.MADE_EXPLORER
    made.parent.mkdir(parents=True)
    made.write_text("<p>all results</p>")
    text = pages._explorer(tmp_path)
    assert "It sorts." in text and "Next" not in text
    place = f"files/{pages.MADE_EXPLORER}"
    assert f"[Open the explorer]({place})" in pages.site_text(tmp_path, "explorer.md", text)
    assert pages.linked_files(tmp_path, {"explorer.md": text}) == {place: made.read_bytes()}


def test_drawings_are_those_of_their_scripts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = sorted((root / "docs/images").glob("*.py"))
    assert len(scripts) >= 6
    monkeypatch.syspath_prepend(str(tmp_path))
    for script in scripts:
        shutil.copy(script, tmp_path)
    for script in scripts:
        runpy.run_path(str(tmp_path / script.name), run_name="__main__")
        drawn = (tmp_path / script.name).with_suffix(".svg").read_bytes()
        assert drawn == script.with_suffix(".svg").read_bytes(), f"run docs/images/{script.name}"
    sys.modules.pop("kernels", None)
