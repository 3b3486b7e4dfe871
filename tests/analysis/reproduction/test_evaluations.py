"""Evaluations: exact facts, and scores and losses in pairs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kvquant.study.config import Study
from tests.support.reproductions import measured_otherwise, reproduce, rows_of


def test_a_prompt_that_changed_its_score_is_no_evidence_of_a_difference(
    study: Study, own: Path, tmp_path: Path
) -> None:
    def flip(record: dict[str, object], rows: list[dict[str, object]]) -> None:
        rows[0]["score"] = 1.0 - float(str(rows[0]["score"]))

    measured_otherwise(own / "eval/tiny/kivi-4/passkey/seed0/run.json", flip)
    assert reproduce(study, tmp_path, own) == 0
    (row,) = rows_of(tmp_path, "score", "passkey", "kivi-4").to_dict("records")
    assert row["verdict"] == "not enough evidence"
    assert row["low"] < row["difference"] < row["high"]
    assert abs(row["difference"]) == pytest.approx(100 / 8)  # one of eight prompts
    assert row["tolerance"].startswith("within ±") and row["results"] == 2


def test_other_bytes_and_other_prompts_differ(study: Study, own: Path, tmp_path: Path) -> None:
    measured_otherwise(
        own / "eval/tiny/kivi-4/ruler/seed0/run.json",
        lambda record, rows: record.update(cache_bytes=record["cache_bytes"] + 100),
    )

    def asked_otherwise(record: dict[str, Any], rows: object) -> None:
        record["prompts_sha256"] = record["inputs"]["prompts"] = "9" * 64

    measured_otherwise(own / "eval/tiny/kivi-4/passkey/seed0/run.json", asked_otherwise)
    assert reproduce(study, tmp_path, own) == 0
    for quantity in ("cache bytes", "bits per element"):
        (row,) = rows_of(tmp_path, quantity, "ruler", "kivi-4").to_dict("records")
        assert row["verdict"] == "differs" and row["difference"] > 0
    (row,) = rows_of(tmp_path, "prompts", "passkey", "kivi-4").to_dict("records")
    assert row["verdict"] == "differs" and row["own_text"].startswith("9" * 12)
    assert not len(rows_of(tmp_path, "score", "passkey", "kivi-4"))  # other prompts are no pairs
    assert len(rows_of(tmp_path, "score", "ruler", "kivi-4")) == 1


@pytest.mark.parametrize(
    ("share", "whole", "quantity", "verdict"),
    [
        (0.02, True, "cache bytes", "differs"),
        (0.02, False, "cache bytes, with room for outliers", "reproduced"),
        (0.10, False, "cache bytes, with room for outliers", "differs"),
        (0.00, False, "cache bytes", "reproduced"),
    ],
)
def test_room_for_outliers_depends_on_the_batch(
    study: Study, own: Path, tmp_path: Path, share: float, whole: bool, quantity: str, verdict: str
) -> None:
    """Where seeds were left out; a scheme without outliers has no such room."""
    for scheme in ("nuq3", "kivi-4"):
        folder = own / f"eval/tiny/{scheme}/ruler"
        measured_otherwise(
            folder / "seed0/run.json",
            lambda record, rows: record.update(
                cache_bytes=int(record["cache_bytes"] * (1 + share))
            ),
        )
        if not whole:
            shutil.rmtree(folder / "seed1")
    assert reproduce(study, tmp_path, own) == 0
    (row,) = rows_of(tmp_path, quantity, "ruler", "nuq3").to_dict("records")
    assert row["verdict"] == verdict
    (row,) = rows_of(tmp_path, "cache bytes", "ruler", "kivi-4").to_dict("records")
    assert row["verdict"] == ("differs" if share else "reproduced")
