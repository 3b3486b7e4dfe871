"""The record and the samples of a seed are written and read as a pair, by one run at a time."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from kvquant.errors import UserError
from kvquant.evaluation import seed_files
from kvquant.evaluation.base import SuiteResult
from kvquant.study.digests import eval_digest
from kvquant.study.records import EvalRecord, read_record
from tests.support.studies import study_of, write_study

STUDY = study_of(seeds=[0], schemes={"fp16": {"kind": "fp16"}, "nuq3": {"kind": "nuq", "bits": 3}})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvalRecord, SuiteResult]:
    """A seed that was measured and not yet written."""
    results = tmp_path_factory.mktemp("study") / "results"
    write_study(STUDY, results)
    folder = results / "eval/tiny/nuq3/passkey/seed0"
    record = read_record(folder / seed_files.RECORD, EvalRecord)
    text = (folder / seed_files.SAMPLES).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    result = SuiteResult(
        metric=record.metric,
        higher_is_better=record.higher_is_better,
        value=record.value,
        metrics=record.metrics,
        protocol=record.protocol,
        rows=rows,
        tokens=record.tokens,
        cache_bytes=record.cache_bytes,
        cache_elements=record.cache_elements,
    )
    return record, result


def test_a_seed_that_is_stored_reads_the_same(
    measured: tuple[EvalRecord, SuiteResult], tmp_path: Path
) -> None:
    record, text = seed_files.store(tmp_path / "seed0", *measured)
    digest = eval_digest(STUDY, "tiny", "nuq3", "passkey", 0)
    found = seed_files.read_pair(tmp_path / "seed0", digest, record.prompts_sha256)
    assert found is not None and found[0].samples_sha256 == record.samples_sha256
    assert found[1] == text


def test_a_second_run_waits_until_the_pair_is_whole(
    measured: tuple[EvalRecord, SuiteResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that has seen no record must not discard what another is about to complete."""
    record, result = measured
    folder, refusals, second = tmp_path / "seed0", [], []
    write = seed_files.write_record

    def other_run() -> None:
        try:
            seed_files.store(folder, record.model_copy(update={"seconds": 9.0}), result)
        except UserError as error:
            refusals.append(str(error))

    def write_while_another_comes(path: Path, whole: Any) -> None:
        monkeypatch.setattr(seed_files, "write_record", write)
        second.append(Thread(target=other_run))
        second[0].start()
        second[0].join(0.5)  # long enough to discard the samples, if nothing holds it back
        write(path, whole)

    monkeypatch.setattr(seed_files, "write_record", write_while_another_comes)
    stored, text = seed_files.store(folder, record, result)
    second[0].join()
    assert len(refusals) == 1 and "exists with other content" in refusals[0]
    assert (folder / seed_files.SAMPLES).read_text() == text
    assert read_record(folder / seed_files.RECORD, EvalRecord).seconds == stored.seconds
