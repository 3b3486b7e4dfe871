"""Texts and rows of data sets that tests evaluate on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

TEXT = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    "There is an important info hidden inside a lot of irrelevant text. Remember it. "
    "One of the special magic numbers for some word is: what are they mentioned in the text? "
)
ESSAYS = "This is a sentence about nothing. Another one follows it at once. " * 400
CORPUS = "The cat sat on the mat and the dog ran to the red house near a river. " * 400


def write_corpus(folder: Path, name: str = "data.json") -> Path:
    """Writes `text.txt` and its manifest as `kvquant fetch-data` would; returns the manifest."""
    (folder / "text.txt").write_text(CORPUS)
    manifest = folder / name
    manifest.write_text(
        json.dumps(
            {
                "dataset": "essays",
                "source": "test",
                "sha256": hashlib.sha256(CORPUS.encode()).hexdigest(),
                "characters": len(CORPUS),
                "test_from": len(CORPUS) // 2,
                "file": "text.txt",
            }
        )
    )
    return manifest


def longbench_row(number: int, **more: Any) -> dict[str, Any]:
    """A row of a LongBench task of which the answer is `word <number>`."""
    base = {"context": f"{TEXT * 3} Word {number}.", "input": f"Which {number}?"}
    return {**base, "answers": [f"word {number}", "none"], "all_classes": None, **more}


def json_lines(rows: list[dict[str, Any]]) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
