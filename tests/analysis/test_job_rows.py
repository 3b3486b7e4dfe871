"""The table `jobs`: a row per cache of a case, also of published records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis.collect import collect
from kvquant.analysis.problems import Problems
from kvquant.errors import UserError
from kvquant.formats.sealing import seal_of
from kvquant.study.config import Study
from kvquant.study.digests import jobs_digest
from kvquant.study.publish import publish
from kvquant.study.record_types import JobTrial
from kvquant.study.records import JobRecord, JobSide, Percentiles, write_record
from tests.support.studies import DEVICE, study_of

CASE: dict[str, Any] = {
    "shape": "tiny",
    "prompt": 30,
    "answer": 10,
    "schemes": ["fp16", "nuq3"],
    "trials": 2,
}


def study(**changed: Any) -> Study:
    return study_of(jobs={"cases": {"job": CASE}}, **changed)


def side(scheme: str, seconds: float) -> JobSide:
    """Two trials of a job of two prompts."""
    times = Percentiles(median=1.0, p10=0.9, p90=1.1, p99=1.2, n=5)
    trials = [JobTrial(jobs=1, prefill_seconds=seconds, decode_seconds=n) for n in (1.0, 3.0)]
    rates: dict[str, Any] = {
        "prefill_tokens_per_s": 120 / (2 * seconds),
        "decode_tokens_per_s": 40 / 4.0,
    }
    rates["job_tokens_per_s"] = 160 / (2 * seconds + 4.0)
    cache: dict[str, Any] = {"cache_bytes": 100, "cache_elements": 50, "bits_per_element": 16.0}
    return JobSide(
        scheme=scheme,
        status="ok",
        batch_size=2,
        trials=trials,
        first_token_ms=times,
        step_ms=times,
        **rates,
        **cache,
    )


def write(results: Path, *sides: JobSide) -> None:
    record = JobRecord(
        study="check",
        spec_digest=jobs_digest(study(), "job"),
        device=DEVICE,
        case="job",
        shape="tiny",
        prompt=30,
        answer=10,
        memory_bytes=1000,
        emulated=False,
        weight_bytes=10,
        sides=list(sides),
        seconds=1.0,
    )
    write_record(results / "jobs" / DEVICE / "job.json", record)


def rows(results: Path, **changed: Any) -> pd.DataFrame:
    return collect(study(**changed), results, DEVICE, Problems(present=True))["jobs"]


def test_the_gpus_are_those_of_the_case(tmp_path: Path) -> None:
    write(tmp_path, side("fp16", 2.0), side("nuq3", 1.0))
    assert list(rows(tmp_path).gpus) == [1, 1]
    file = tmp_path / "jobs" / DEVICE / "job.json"
    for changed, word in (
        ({"gpus": 2}, "field 'gpus': is 2, but the study's is 1"),
        ({"environment": {"gpus": [{}, {}]}}, "field 'environment.gpus': lists 2"),
    ):
        raw = json.loads(file.read_text()) | changed
        other = tmp_path / "other" / "jobs" / DEVICE / "job.json"
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text(json.dumps(raw | {"seal": seal_of(raw)}))
        with pytest.raises(UserError, match=re.escape(word)):
            collect(study(), tmp_path / "other", DEVICE, Problems(present=False))


def test_a_row_per_cache(tmp_path: Path) -> None:
    write(tmp_path / "r", side("fp16", 2.0), JobSide(scheme="nuq3", status="oom"))
    found = rows(tmp_path / "r")
    assert list(found.scheme) == ["fp16", "nuq3"] and list(found.status) == ["ok", "oom"]
    first = found.iloc[0]
    assert (first.job_seconds_low, first.job_seconds_high) == (3.0, 5.0)
    assert (first.trials, first.jobs, first.step_ms_p90) == (2, 2, 1.1)
    assert pd.isna(found.iloc[1].job_tokens_per_s) and found.iloc[1].trials == 0
    publish(tmp_path / "r", tmp_path / "a")
    again = rows(tmp_path / "none", published=str(tmp_path / "a"))
    pd.testing.assert_frame_equal(found, again)
    assert rows(tmp_path / "none").empty


def test_other_caches_than_the_studys_are_refused(tmp_path: Path) -> None:
    write(tmp_path, side("fp16", 2.0))
    with pytest.raises(UserError, match=r"job\.json: field 'sides\.scheme': the study's are fp16,"):
        rows(tmp_path)
