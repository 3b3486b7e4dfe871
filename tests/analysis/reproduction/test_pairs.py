"""Pairs of records: the nearest device, and quantizers that are not the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvquant.analysis.reproduction.pairs import Pair, find
from kvquant.errors import UserError
from kvquant.study.config import Study
from kvquant.study.publish import publish
from tests.support.reproductions import measured_otherwise
from tests.support.studies import study_of, write_evaluation, write_study

PUBLISHED = "a" * 64


def quantized(folder: Path, own: str, *, kept: bool) -> tuple[Study, Path]:
    """One result on both sides, with quantizers of the hashes `PUBLISHED` and `own`."""
    study = study_of()
    for name, digest in (("first", PUBLISHED), ("own", own)):
        write_evaluation(study, folder / name, "tiny", "nuq3", "passkey", 0, digest)
    publish(folder / "first", folder / "published")
    if kept:
        there = folder / "published/quantizers/tiny/nuq3"
        there.mkdir(parents=True)
        (there / "quantizer.json").write_text(json.dumps({"tensors_sha256": PUBLISHED}))
    return study, folder


def pairs_of(study: Study, folder: Path, own_quantizers: bool = False) -> list[Pair]:
    return find(study, folder / "own", folder / "published", own_quantizers).pairs


def test_the_published_quantizer_is_the_same(tmp_path: Path) -> None:
    (pair,) = pairs_of(*quantized(tmp_path, PUBLISHED, kept=True))
    assert pair.quantizer == "the published one"


@pytest.mark.fault(
    "records",
    "results measured again with another quantizer than the published one",
    "refused by name, or said where it was asked for",
)
def test_another_quantizer_is_refused_unless_asked_for(tmp_path: Path) -> None:
    study, folder = quantized(tmp_path, "b" * 64, kept=True)
    with pytest.raises(UserError, match=r"field 'inputs\.quantizer': is another quantizer") as told:
        pairs_of(study, folder)
    assert str(folder / "own/eval/tiny/nuq3/passkey/seed0/run.json") in str(told.value)
    assert "--own-quantizers" in str(told.value)
    (pair,) = pairs_of(study, folder, own_quantizers=True)
    assert pair.quantizer == "calibrated again"


def test_where_none_is_published_a_calibration_is_compared(tmp_path: Path) -> None:
    (pair,) = pairs_of(*quantized(tmp_path, "b" * 64, kept=False))
    assert pair.quantizer == "calibrated again"


def test_results_of_another_device_are_compared_with_those_there_are(
    first: tuple[Study, Path], tmp_path: Path
) -> None:
    study, folder = first
    write_study(study, tmp_path / "r")
    files = sorted((tmp_path / "r/kernels/gpu").iterdir())
    for file in files:
        to = tmp_path / "own/kernels/other" / file.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
        measured_otherwise(to, lambda record, rows: record.update(device="other"))
    found = find(study, tmp_path / "own", folder / "published", False)
    (pair,) = found.pairs
    assert (pair.published.device, pair.own.device) == ("gpu", "other")
    assert not any(one.stage == "kernels" for one in found.missing)
