"""`kvquant calibrate` has two ways, from texts and of a study, which it tells apart.

The way of a study is tested in test_from_texts.py and test_collect.py.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

import kvquant
from kvquant.cli import main
from tests.support.models import save_tiny
from tests.support.text import CORPUS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "model", positions=512)
    (place / "corpus.txt").write_text(CORPUS)
    return place


FEW = ["--device", "cpu", "--windows", "2", "--window", "96"]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--bits", "4", "--seed", "3"], {"bits": 4, "seed": 3}),
        (["--scheme", "kind=nuq,bits=2"], {"scheme": {"kind": "nuq", "bits": 2}}),
    ],
)
def test_it_makes_the_quantizer_of_the_library(
    words: list[str],
    given: dict[str, Any],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, text = place / "model", place / "corpus.txt"
    base = ["calibrate", "--model", str(model), "--text", str(text), "--out", str(tmp_path / "q")]
    assert main([*base, *FEW, *words]) == 0
    said = capsys.readouterr()
    assert "2 layers, 2 windows of 96 tokens" in said.out and not said.err
    found = kvquant.load_quantizer(tmp_path / "q")
    made = kvquant.calibrate(model, texts=text, device="cpu", windows=2, window=96, **given)
    assert found.tensors_sha256 == made.tensors_sha256
    assert found.manifest.weights_sha256 is not None
    assert main([*base, *FEW]) == 2  # nothing is overwritten
    assert "q holds a quantizer; delete it, or choose another" in capsys.readouterr().err


def test_a_short_text_is_told_of_in_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text(CORPUS[:900])
    words = ["calibrate", "--model", str(place / "model"), "--text", str(tmp_path / "short.txt")]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main([*words, *FEW, "--windows", "9", "--out", str(tmp_path / "q")]) == 0
    said = capsys.readouterr().err
    assert said.startswith("kvquant: warning: texts: have ") and said.count("\n") == 1


STUDY = ["--study", "s.yaml", "--model-manifest", "m.json", "--data-manifest", "d.json"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            [*STUDY, "--text", "a.txt"],
            "--text: a study names its own texts; leave it or --study out",
        ),
        ([*STUDY, "--bits", "3"], "--bits: a study names its own schemes"),
        ([*STUDY, "--windows", "3"], "--windows: a study says so in `calibration`"),
        (["--text", "a", "--data-manifest", "d"], "--data-manifest: belongs to a study; give"),
        (["--text", "a", "--calibration", "d"], "--calibration: belongs to a study; give --study"),
        (["--study", "s.yaml"], "--model-manifest: is missing; give the manifest.json"),
        ([], "--text: is missing; give files like those that the model will read"),
        (["--text", "a", "--bits", "5"], "--bits: 5 is none of 4, 3 and 2"),
        (["--text", "a", "--bits", "3", "--scheme", "nuq"], "leave --bits or --scheme out"),
        (["--text", "a", "--scheme", "kivi-4"], "--scheme: 'kivi-4' needs no calibration; use it"),
        (["--text", "nowhere.txt"], "--text: no such file: nowhere.txt"),
        (["--text", "."], "--text: .: a folder, not a file"),
        (["--text", "a", "--out", "q.safetensors"], "--out: q.safetensors names a file"),
        (["--text", "a", "--out", "README.md/q"], "README.md is no folder that can be written"),
    ],
)
def test_what_cannot_be_takes_one_line(
    words: list[str], told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["calibrate", "--model", str(place / "model"), "--out", "build/q"]
    assert main([*base, *words]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("left_out", "words", "told"),
    [
        ("--out", ["--text", "a"], "--out: is missing; give the folder of the quantizer"),
        ("--out", STUDY, "--out: is missing; give the file of the statistics"),
        ("--model", ["--text", "a"], "--model: is missing; give the folder or hub id"),
    ],
)
def test_what_is_missing_is_named(
    left_out: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--model": "m", "--out": "q"}
    rest = [part for name, value in given.items() if name != left_out for part in (name, value)]
    assert main(["calibrate", *rest, *words]) == 2
    assert told in capsys.readouterr().err


def test_a_pipe_is_a_text(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell's `<(...)` gives one."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[CORPUS])
    writer.start()
    words = ["--model", str(place / "model"), "--text", str(tmp_path / "pipe")]
    assert main(["calibrate", *words, *FEW, "--out", str(tmp_path / "q")]) == 0
    writer.join()
    assert (tmp_path / "q" / "quantizer.json").is_file() and not capsys.readouterr().err


def test_folders_of_models_are_safe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(place / "model"), "--text", str(place / "corpus.txt")]
    assert main(["calibrate", *words, "--out", str(place / "model")]) == 2
    assert "is a model's folder; choose another" in capsys.readouterr().err
