"""The scripts of `examples/` and the README's lines run as they are, on a tiny model."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

import kvquant
from tests.support.models import save_tiny
from tests.support.text import CORPUS


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a text where the README's lines look for them."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "resources/models/smollm2-135m", positions=1024)
    text = work / "resources/data/essays/text.txt"
    text.parent.mkdir(parents=True)
    text.write_text(CORPUS)
    model = work / "resources/models/smollm2-135m"
    kvquant.calibrate(model, texts=CORPUS, windows=1, window=96, device="cpu").save(work / "q")
    return work


@pytest.fixture
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def snippets(page: Path, heading: str) -> list[str]:
    """The Python code below a heading of a page."""
    section = page.read_text(encoding="utf-8").split(f"\n{heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def test_the_lines_of_the_readme_run(
    root: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = snippets(root / "README.md", "## Using the library")
    assert len(code.splitlines()) <= 9
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert {file.name for file in (here / "build/smollm2-3bit").iterdir()} == {
        "quantizer.json",
        "quantizer.safetensors",
        "README.md",
    }
    answers = ast.literal_eval(capsys.readouterr().out)
    assert [type(answer) for answer in answers] == [str, str]
    assert "QuantizedModel" in type(namespace["qm"]).__name__


MODEL = ["--model", "resources/models/smollm2-135m"]
TEXT = ["--text", "resources/data/essays/text.txt"]
QUANTIZER, NEW = ["--quantizer", "q"], ["--quantizer", "build/new"]
SCRIPTS = {
    "quickstart": [
        (
            [*MODEL, *TEXT, *NEW, "--windows", "2", "--window", "96", "--max-new-tokens", "4"],
            "> What is a KV cache?",
        ),
        ([*MODEL, *NEW, "--max-new-tokens", "2"], "> Name three rivers in Europe."),
    ],
    "ragged_batch": [
        ([*MODEL, "--max-new-tokens", "4"], "sampled: "),
        ([*MODEL, *QUANTIZER, "--max-new-tokens", "4"], "greedy: "),
    ],
    "chunked_prefill": [
        (
            [*MODEL, *TEXT, *QUANTIZER, "--tokens", "300", "--chunk", "128"],
            r"300 tokens in [\d,]+ bytes: \d\.\d\d bits per element",
        )
    ],
    "compare_schemes": [
        ([*MODEL, *TEXT, *QUANTIZER, "--tokens", "300", "--device", "cpu"], r"fp16 .* 16\.00 "),
    ],
}


def test_every_script_is_run(root: Path) -> None:
    assert {file.stem for file in (root / "examples").glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run(
    name: str,
    root: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(root / f"examples/{name}.py")
    for words, told in SCRIPTS[name]:
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(script, run_name="__main__")
        assert re.search(told, capsys.readouterr().out)
