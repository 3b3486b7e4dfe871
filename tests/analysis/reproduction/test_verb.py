"""The verb reproduce: what was measured again is compared with what is published.

Also covers: analysis.reproduction.options, analysis.reproduction.result.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from kvquant.study.config import Study
from kvquant.study.reproduce import ReproduceSpec
from tests.support.reproductions import measured_otherwise, reproduce, rows_of

SEED = "eval/tiny/nuq3/passkey/seed0/run.json"


def test_the_same_numbers_are_reproduced(
    study: Study, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(study, tmp_path, own, "--fail-if-differs") == 0
    told = capsys.readouterr().out
    assert " 0 differ and 0 lack evidence" in told
    assert "Of 35 published results 35 were measured again and 0 were not run" in told
    table = pd.read_parquet(tmp_path / "tables/reproduce.parquet")
    assert set(table["verdict"]) == {"reproduced", "not judged"}
    assert set(table["stage"]) == {"eval", "throughput", "energy", "append", "kernels"}
    assert len(table) == len(pd.read_csv(tmp_path / "tables/reproduce.csv"))
    assert "35 were measured again" in (tmp_path / "reproduce.html").read_text()


def test_what_was_not_run_is_counted_and_what_of_it_was_planned(
    study: Study, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("perf", "energy", "append", "kernels", "eval/tiny/fp16", "eval/tiny/kivi-4"):
        shutil.rmtree(own / name)
    for task in ("ppl", "ruler", "qasper", "passkey/seed1"):
        shutil.rmtree(own / "eval/tiny/nuq3" / task)
    asked = ReproduceSpec(tasks=["passkey"], schemes=["nuq3", "kivi-4"], published=study.published)
    again = study.model_copy(update={"reproduce": asked, "published": None})
    assert reproduce(again, tmp_path, own) == 0
    told = capsys.readouterr().out
    # of two schemes and two seeds one is there
    assert "1 were measured again and 34 were not run, 3 of them planned" in told
    table = pd.read_parquet(tmp_path / "tables/reproduce.parquet")
    left = table[table["verdict"] == "not run"].set_index(["stage", "scheme", "what"])
    assert left["results"].sum() == 34
    assert left.loc[("eval", "kivi-4", "passkey"), "note"] == "2 planned"
    assert left.loc[("eval", "nuq3", "ppl"), "note"] == ""


def test_another_loss_differs_and_may_fail_the_run(study: Study, own: Path, tmp_path: Path) -> None:
    for seed in study.seeds:
        measured_otherwise(
            own / f"eval/tiny/nuq3/ppl/seed{seed}/run.json",
            lambda record, rows: [row.update(nll=row["nll"] + 63) for row in rows],
        )
    assert reproduce(study, tmp_path, own) == 0
    assert reproduce(study, tmp_path, own, "--fail-if-differs") == 1
    (row,) = rows_of(tmp_path, "loss", "ppl", "nuq3").to_dict("records")
    assert row["verdict"] == "differs" and row["difference"] == pytest.approx(1.0)
    (row,) = rows_of(tmp_path, "KL divergence", "ppl", "nuq3").to_dict("records")
    assert row["verdict"] == "reproduced" and row["note"] == "every pair is equal"


def test_results_of_which_nothing_is_published_are_no_comparison(
    study: Study, own: Path, tmp_path: Path
) -> None:
    for name in ("perf", "energy", "append", "kernels"):
        shutil.rmtree(own / name)
    one = own / "eval/tiny/fp16/ppl/seed7/run.json"
    shutil.copytree(own / "eval/tiny/fp16/ppl/seed0", one.parent)
    measured_otherwise(one, lambda record, rows: record.update(seed=7))
    assert reproduce(study, tmp_path, own) == 0
    assert "1 own results have no published" in (tmp_path / "reproduce.html").read_text()


@pytest.mark.fault(
    "records", "an edited number among results that were measured again", "refused by file and seal"
)
def test_an_edited_record_is_refused(
    study: Study, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (own / SEED).read_text()
    (own / SEED).write_text(text.replace('"cache_bytes": ', '"cache_bytes": 1', 1))
    assert reproduce(study, tmp_path, own) == 2
    told = capsys.readouterr().err
    assert str(own / SEED) in told and told.count("\n") == 1
    assert not (tmp_path / "reproduce.html").exists()


@pytest.mark.fault(
    "records",
    "results measured again after the study's entry changed",
    "refused by name, with both digests",
)
def test_another_configuration_is_refused(
    study: Study, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_otherwise(own / SEED, lambda record, rows: record.update(spec_digest="f" * 16))
    assert reproduce(study, tmp_path, own) == 2
    told = capsys.readouterr().err
    assert f"{own / SEED}: field 'spec_digest': was measured with another configuration" in told
    assert "published/eval/tiny/nuq3.jsonl:" in told and "f" * 16 in told


def test_a_study_without_published_records_is_refused(
    study: Study, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = study.model_copy(update={"published": None})
    assert reproduce(alone, tmp_path, own) == 2
    assert "--archive: the study names no published records" in capsys.readouterr().err
    nowhere = ["--archive", str(tmp_path / "none")]
    assert reproduce(alone, tmp_path, own, *nowhere) == 2
    assert "no published records below" in capsys.readouterr().err
    assert json.loads((own / SEED).read_text())["seed"] == 0
