"""The verb seal: records of schema version 1 get their seal once, or none of a folder does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvquant.cli import main
from kvquant.formats.files import sha256_file
from kvquant.study.records import EvalRecord, read_record
from tests.support.studies import study_of, write_evaluation


def old(results: Path, seed: int, **changed: object) -> Path:
    """A seed as it was before there were seals."""
    write_evaluation(study_of(), results, "tiny", "fp16", "passkey", seed)
    file = results / "eval/tiny/fp16/passkey" / f"seed{seed}" / "run.json"
    raw = json.loads(file.read_text())
    for name in ("inputs", "seal"):
        raw.pop(name)
    file.write_text(json.dumps(raw | {"schema_version": 1} | changed, indent=2) + "\n")
    return file


def test_sealed_once_with_nothing_else_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [old(tmp_path, seed) for seed in (0, 1)]
    before = files[0].read_text().splitlines()
    assert main(["seal", "--results", str(tmp_path)]) == 0
    assert "2 records sealed, 0 already had a seal" in capsys.readouterr().out
    assert read_record(files[0], EvalRecord).samples == 4
    after = files[0].read_text().splitlines()
    assert set(before) - set(after) == {'  "schema_version": 1,'}
    assert {line.split(":")[0] for line in set(after) - set(before)} == {
        *('  "schema_version"', '  "inputs"', '  "seal"')
    }
    content = [file.read_bytes() for file in files]
    assert main(["seal", "--results", str(tmp_path)]) == 0
    assert "0 records sealed, 2 already had a seal" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == content


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"value": "50"}, "value"),
        ({"value": 99.0, "metrics": {"accuracy": 99.0}}, "its samples give"),
        ({"cache_bytes": 1}, "field 'bits_per_element'"),
        ({"samples_sha256": "0" * 64}, "samples.jsonl: missing, truncated or changed"),
        ({"kind": "other"}, "field 'kind'"),
        ({"more": 1}, "more"),
    ],
)
def test_a_folder_with_a_wrong_record_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, object], word: str
) -> None:
    files = [old(tmp_path, 0), old(tmp_path, 1, **changed)]
    hashes = [sha256_file(file) for file in files]
    assert main(["seal", "--results", str(tmp_path)]) == 2
    told = capsys.readouterr().err.strip()
    assert "/seed1/" in told and word in told and "\n" not in told
    assert [sha256_file(file) for file in files] == hashes


def test_an_empty_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seal", "--results", str(tmp_path)]) == 2
    assert "--results: no record below" in capsys.readouterr().err
