"""A tiny model in a folder, with a quantizer and texts, for the verbs that people type."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import kvquant
from tests.support.models import save_tiny
from tests.support.text import CORPUS, TEXT


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `quantizer`, `prompt.txt` and `corpus.txt`."""
    place = tmp_path_factory.mktemp("place")
    model = save_tiny(place / "model", positions=512)
    made = kvquant.calibrate(model, texts=CORPUS, device="cpu", windows=1, window=96)
    made.save(place / "quantizer")
    (place / "prompt.txt").write_text(TEXT + "\n")
    (place / "corpus.txt").write_text(CORPUS)
    return place


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> object:
    """A function that puts a text on standard input, as a pipe does."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))
