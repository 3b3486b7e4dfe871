"""Perplexity is never measured on text that codebooks were fitted to."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.fetch.text_overlap import (
    calibrated_text,
    check_apart,
    described_text,
    fingerprints,
    shared_share,
)

WORDS = ("ore", "ice", "fig", "oak", "elm", "yew", "ash", "bay", "hay", "rye", "dew", "fog")


def prose(seed: int, words: int = 12_000) -> str:
    """Random words, the same for a seed."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + str(draw.randrange(50)) for _ in range(words))


def put(folder: Path, text: str, test_from: int) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    facts = {"dataset": folder.name, "source": "mine", "file": "text.txt", "test_from": test_from}
    facts |= {"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)}
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder / "manifest.json"


@pytest.mark.fault(
    "custody",
    "test text that was calibrated on, by ranges of one text",
    "refused",
)
def test_parts_of_one_text(tmp_path: Path) -> None:
    text = prose(0)
    first = put(tmp_path / "a", text, 30_000)
    calibrated = calibrated_text(first)
    check_apart(calibrated, first)
    check_apart(calibrated, put(tmp_path / "later", text, 40_000))
    with pytest.raises(UserError, match="first 30000 of the same text"):
        check_apart(calibrated, put(tmp_path / "earlier", text, 29_999))
    with pytest.raises(UserError, match="same text"):
        check_apart(calibrated, put(tmp_path / "whole", text, 0))


def test_the_shared_fraction_of_a_text() -> None:
    text = prose(0)
    read = described_text("texts", text)
    assert shared_share(read, text[1_000:9_000]) == 1.0
    assert shared_share(read, prose(1)) == 0.0
    assert 0.3 < shared_share(read, text[:20_000] + prose(1)[:20_000]) < 0.7


@pytest.mark.fault(
    "custody",
    "passages of the test text in another calibration text",
    "refused",
)
def test_passages_of_another_text(tmp_path: Path) -> None:
    text = prose(0)
    calibrated = calibrated_text(put(tmp_path / "a", text, 40_000))
    check_apart(calibrated, put(tmp_path / "other", prose(1), 0))
    # The rest of the text, and a quotation, are no overlap.
    check_apart(calibrated, put(tmp_path / "rest", text[40_000:], 0))
    check_apart(calibrated, put(tmp_path / "quotes", prose(2) + text[100:300] + prose(3), 0))
    for name, mixed in (
        ("same", text[:40_000]),
        ("shifted", "x" + text[17:39_000]),
        ("half", prose(4)[:15_000] + text[5_000:20_000]),
    ):
        with pytest.raises(UserError, match="that the quantizer was calibrated on") as error:
            check_apart(calibrated, put(tmp_path / name, mixed, 0))
        assert len(str(error.value).splitlines()) == 1


def test_fingerprints_of_little_text() -> None:
    assert fingerprints("") == fingerprints("x" * 47) == []
    assert len(fingerprints("x" * 5_000)) <= 1
    found = fingerprints(prose(5))
    assert found == sorted(set(found)) and 50 < len(found) < 250
    assert max(found) < 2**32
