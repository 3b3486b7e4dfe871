"""The verb publish: results of finished jobs become published records, all of them or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvquant.cli import main
from kvquant.study.archive import read_archive
from tests.support.studies import study_of, write_evaluation, write_study

ROOT = Path(__file__).parents[2]


def call(results: Path, archive: Path) -> int:
    return main(["publish", "--results", str(results), "--archive", str(archive)])


def hashes(archive: Path) -> str:
    return (archive / "SHA256SUMS").read_text()


def test_published_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, results, archive = study_of(), tmp_path / "r", tmp_path / "a"
    write_evaluation(study, results, "tiny", "fp16", "passkey", 0)
    assert call(results, archive) == 0
    assert "1 records published, 0 were before" in capsys.readouterr().out
    write_study(study, tmp_path / "more")  # another run, which measured the same cells and more
    for file in (tmp_path / "more/eval/tiny/fp16/passkey/seed0").iterdir():
        file.write_bytes((results / file.relative_to(tmp_path / "more")).read_bytes())
    assert call(tmp_path / "more", archive) == 0
    assert "34 records published, 1 were before" in capsys.readouterr().out
    sums = hashes(archive)
    assert call(tmp_path / "more", archive) == 0
    out = capsys.readouterr().out
    assert "0 records published, 35 were before" in out and "35 published records are as" in out
    assert hashes(archive) == sums


@pytest.mark.fault(
    "records", "another record of a name that is published", "refused by name, nothing published"
)
def test_another_record_of_the_same_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, results, archive = study_of(), tmp_path / "r", tmp_path / "a"
    write_evaluation(study, results, "tiny", "fp16", "passkey", 0)
    assert call(results, archive) == 0
    sums = hashes(archive)
    other = study.model_copy(update={"study": "other"})
    write_evaluation(other, tmp_path / "s", "tiny", "fp16", "passkey", 0)
    write_evaluation(study, tmp_path / "s", "tiny", "fp16", "passkey", 1)
    capsys.readouterr()
    assert call(tmp_path / "s", archive) == 2
    told = capsys.readouterr().err
    assert "seed0/run.json: is another record than the published one" in told
    assert f"{archive}/eval/tiny/fp16.jsonl:1" in told and told.count("\n") == 1
    assert hashes(archive) == sums
    write_evaluation(other, tmp_path / "t", "tiny", "fp16", "ruler", 0)
    assert call(tmp_path / "t", archive) == 2
    assert "field 'study': is 'other', the published records' is 'check'" in capsys.readouterr().err


def test_records_of_two_studies_in_one_folder_are_not_published_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, results, archive = study_of(), tmp_path / "r", tmp_path / "a"
    other = study.model_copy(update={"study": "other"})
    write_evaluation(study, results, "tiny", "fp16", "passkey", 0)
    write_evaluation(other, results, "tiny", "fp16", "ruler", 0)
    assert call(results, archive) == 2
    told = capsys.readouterr().err
    assert "ruler/seed0/run.json: field 'study': is 'other'" in told and "is 'check'" in told
    assert not archive.exists()


def test_sums_of_no_records_are_not_renewed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", "--renew-sums", "--archive", str(tmp_path / "typo")]) == 2
    assert "no published records below" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("what", ["value", "samples", "place", "json"])
def test_damaged_results_are_not_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    write_evaluation(study_of(), tmp_path / "r", "tiny", "fp16", "passkey", 0)
    folder = tmp_path / "r/eval/tiny/fp16/passkey/seed0"
    run, samples = folder / "run.json", folder / "samples.jsonl"
    if what == "value":
        run.write_text(run.read_text().replace('"value": ', '"value": 1', 1))
    elif what == "samples":
        samples.write_text(samples.read_text().replace("0.", "1.", 1))
    elif what == "place":
        folder.rename(folder.with_name("seed1"))
    else:
        run.write_text(json.dumps([1]))
    assert call(tmp_path / "r", tmp_path / "a") == 2
    told = capsys.readouterr().err
    assert "/passkey/seed" in told and told.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_samples_of_power_lie_beside_their_record(tmp_path: Path) -> None:
    study, results, archive = study_of(), tmp_path / "r", tmp_path / "a"
    archive.mkdir()  # an empty folder is as good as none
    write_study(study, results)
    job = next((results / "energy").rglob("*.json"))
    job.with_suffix(".csv").write_text("seconds,label,joules\n0.1,fp16,3\n")
    assert call(results, archive) == 0
    (curves,) = archive.rglob("*.csv")
    parts = job.with_suffix(".csv").relative_to(results / "energy").parts
    assert curves.relative_to(archive) == Path("energy", "-".join(parts))
    assert curves.name in hashes(archive)
    write_evaluation(study, results, "tiny", "fp16", "passkey", 1)
    assert call(results, archive) == 0
    assert curves.name in hashes(archive)  # what was there stays


STUDIES = {
    **{"h100": 1895, "gemma": 595, "two-gpus": 2},
    **{"quality": 40, "ablation": 63, "attention": 381, "attention-gemma": 15},
}


@pytest.mark.parametrize("study", STUDIES)
def test_the_repository_holds_whole_records(study: str) -> None:
    folder = ROOT / "results/published" / study
    assert main(["publish", "--archive", str(folder)]) == 0

    assert len(read_archive(folder)) >= STUDIES[study]
    assert len(list((ROOT / "results/published").rglob("*"))) < 250
