"""Collected records: published ones, those of jobs, and both; several devices side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvquant.analysis.collect import collect
from kvquant.analysis.problems import Problems
from kvquant.errors import UserError
from kvquant.study.publish import publish
from tests.support.studies import DEVICE, study_of, write_evaluation, write_study


def test_published_records_give_the_tables_of_their_files(tmp_path: Path) -> None:
    study = study_of()
    write_study(study, tmp_path / "r")
    before = collect(study, tmp_path / "r", DEVICE)
    publish(tmp_path / "r", tmp_path / "a")
    study = study_of(published=str(tmp_path / "a"))
    both, alone = collect(study, tmp_path / "r", DEVICE), collect(study, tmp_path / "none", DEVICE)
    assert list(before) == list(both) == list(alone)
    for name, table in before.items():
        assert table.equals(both[name]) and table.equals(alone[name]), name


def test_other_devices_are_rows_of_their_own(tmp_path: Path) -> None:
    study = study_of()
    write_study(study, tmp_path / "r")
    publish(tmp_path / "r", tmp_path / "a")
    study = study_of(published=str(tmp_path / "a"))
    problems = Problems(present=True)
    found = collect(study, tmp_path / "none", "another", problems)
    assert set(found["perf"].device) == {DEVICE} and len(found["kernels"])
    assert problems.missing == 11  # what `another` has not measured
    with pytest.raises(UserError, match=r"missing result: .*perf/another/"):
        collect(study, tmp_path / "none", "another")


@pytest.mark.fault(
    "records", "a result of a job beside another published record of its name", "refused by name"
)
def test_a_job_may_not_contradict_a_published_record(tmp_path: Path) -> None:
    study = study_of()
    write_study(study, tmp_path / "r")
    publish(tmp_path / "r", tmp_path / "a")
    study = study_of(published=str(tmp_path / "a"))
    folder = tmp_path / "r/eval/tiny/fp16/passkey/seed0"
    shutil.rmtree(folder)
    other = study.model_copy(update={"study": "other"})
    write_evaluation(other, tmp_path / "r", "tiny", "fp16", "passkey", 0)
    with pytest.raises(UserError) as caught:
        collect(study, tmp_path / "r", DEVICE)
    assert str(caught.value).startswith(f"{folder}/run.json: is another record than the published")
