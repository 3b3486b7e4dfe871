"""What pages say is true of the code: links, commands, Python code and studies."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import kvquant
from kvquant.cli import VERBS, build_parser
from kvquant.study.config import load_study
from tests.support.models import save_tiny
from tests.support.pages import anchors, blocks, commands, links, markdown_pages
from tests.support.text import CORPUS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [str(page.relative_to(ROOT)) for page in markdown_pages(ROOT)]
WITH_PYTHON = [
    page
    for page in PAGES
    if page != "README.md"  # tests/test_examples.py
    and any(b.language == "python" and not b.not_run for b in blocks(ROOT / page))
]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """On a forge; a strict build of the site finds those that are broken there."""
    page = ROOT / name
    for link in links(page):
        if "://" in link:
            parts = urlsplit(link)
            assert parts.scheme in ("http", "https"), link
            assert "." in parts.netloc, link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def _below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _problem(words: tuple[str, ...], whole: bool) -> str:
    """Why a command would be refused, or nothing."""
    if words[0] not in VERBS:
        return f"{words[0]} is no verb"
    parser = _below(build_parser(words[0]))[words[0]]
    if below := _below(parser):
        what = words[1] if len(words) > 1 else "WHAT"
        if what == "WHAT":  # stands for any of them
            return ""
        if what not in below:
            return f"{what} is none of {list(below)}"
        parser = below[what]
    known = {flag for action in parser._actions for flag in action.option_strings}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if unknown := [option for option in options if option not in known]:
        return f"{unknown} is none of {sorted(known)}"
    if whole and "--help" not in options:
        try:
            build_parser(words[0]).parse_args(words)
        except SystemExit:
            return "the parser refuses it"
    return ""


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_understood(name: str) -> None:
    """What stands as code is a whole command; a sentence may name a part of one."""
    for command in commands(ROOT / name):
        problem = _problem(command.words, command.whole)
        assert not problem, f"kvquant {' '.join(command.words)}: {problem}"


def test_commands_are_found_and_wrong_ones_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Say `kvquant grid --studdy x` or\n`kvquant nothing`.\n\n```\n"
        "uv run kvquant grid --study a.yaml # shows it\nkvquant capacity --model M \\\n"
        "  --memory 24GB | less\nkvquant grid\nkvquant bench kernels --case 1\n```\n"
    )
    found = {" ".join(c.words): _problem(c.words, c.whole) for c in commands(page)}
    assert len(found) == 6
    fine = {"grid --study a.yaml", "capacity --model M --memory 24GB"}
    assert {words for words, problem in found.items() if not problem} == fine


@pytest.mark.parametrize("name", PAGES)
def test_output_is_shown_and_not_promised(name: str) -> None:
    """A lone word in capitals stands for output that somebody meant to fill in."""
    promised = [b.line for b in blocks(ROOT / name) if re.fullmatch(r"[A-Z]+", b.code.strip())]
    assert not promised, f"lines {promised} hold a placeholder"


def test_the_pages_have_what_is_checked() -> None:
    """A pattern that finds nothing would check nothing."""
    assert sum(len(links(ROOT / page)) for page in PAGES) > 150
    assert sum(c.whole for page in PAGES for c in commands(ROOT / page)) > 15
    assert {"docs/library.md", "docs/start-library.md", "docs/own-model.md"} <= set(WITH_PYTHON)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that code on pages takes as given, and a folder in which it runs."""
    work = tmp_path_factory.mktemp("pages")
    model = save_tiny(work / "resources/models/smollm2-135m", positions=512, head_dim=32)
    shutil.copytree(model, work / "FOLDER_OR_HUB_ID")
    text = work / "resources/data/essays/text.txt"
    text.parent.mkdir(parents=True)
    text.write_text(CORPUS)
    qm = kvquant.load(model, scheme="kivi-4", device="cpu")
    return {
        "kvquant": kvquant,
        "work": work,
        "model": str(model),
        "tokenizer": None,
        "texts": [CORPUS],
        "qm": qm,
        "inputs": qm.tokenizer("The cat", return_tensors="pt"),
        "prompts": ["The cat", "The dog ran"],
        "questions": ["Where is the cat?"],
    }


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_code_runs(
    name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page one after the other, on a tiny model."""
    monkeypatch.chdir(given["work"])
    namespace: dict[str, Any] = {}
    for block in blocks(ROOT / name):
        if block.language != "python" or block.not_run:
            continue
        namespace |= given
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, name, "exec"), namespace)


STUDIES = [
    (page, block.code)
    for page in PAGES
    for block in blocks(ROOT / page)
    if block.language == "yaml" and block.code.startswith("# config/")
]


@pytest.mark.parametrize(("name", "code"), STUDIES)
def test_studies_are_valid(name: str, code: str, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(code)
    assert load_study(study).tasks


def test_a_study_is_shown() -> None:
    assert [name for name, _ in STUDIES] == ["docs/own-model.md"]
