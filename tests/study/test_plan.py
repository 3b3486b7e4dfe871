"""What a run measures: nothing that is published, the rest where it can be measured.

Also covers: study.cells.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.study.cells import STAGES, cells_of
from kvquant.study.config import Study, load_study
from kvquant.study.plan import make_plan, obstacle
from kvquant.study.publish import publish
from tests.support.studies import DEVICE, study_of, write_evaluation, write_study

GPU = "h100-80gb-hbm3"


@pytest.mark.parametrize(
    ("changes", "here", "elsewhere", "word"),
    [
        ({}, "cpu", False, "this machine has no GPU"),
        ({}, GPU, False, ""),
        ({}, "h200", False, "this machine's GPU is h200, not h100-80gb-hbm3; --config device=h200"),
        ({"device": "auto"}, "h200", False, ""),
        ({"device": "auto"}, "cpu", False, "no GPU"),
        ({}, "cpu", True, ""),
        ({"gpus": 0, "device": "cpu"}, "cpu", False, ""),
        ({"published": None}, "cpu", False, ""),
    ],
)
def test_who_can_measure(changes: dict[str, object], here: str, elsewhere: bool, word: str) -> None:
    study = study_of(**({"gpus": 1, "device": GPU, "published": "p"} | changes))
    found = obstacle(study, here, elsewhere)
    assert (word in found) if word else (found == "")


def test_cells_are_those_that_a_finished_study_has(tmp_path: Path) -> None:
    study = study_of()
    write_study(study, tmp_path)
    places = {c.place for stage in STAGES for c in cells_of(study, stage, DEVICE)}
    there = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.json")} - {"study.json"}
    assert places == {place for place in there if not place.startswith("resume")}


def published(tmp_path: Path) -> Study:
    """A study of which one task of one scheme is published."""
    study = study_of(published=str(tmp_path / "archive"))
    for seed in study.seeds:
        write_evaluation(study, tmp_path / "first", "tiny", "nuq3", "passkey", seed)
    publish(tmp_path / "first", tmp_path / "archive")
    return study


def test_what_is_published_needs_no_job(tmp_path: Path) -> None:
    study = published(tmp_path)
    write_evaluation(study, tmp_path / "r", "tiny", "fp16", "passkey", 0)
    plan = make_plan(study, DEVICE, tmp_path / "r")
    assert [len(part) for part in (plan.published, plan.finished, plan.absent)] == [2, 1, 32]
    own = ["eval/tiny/fp16/passkey/seed0/run.json"]
    assert plan.files("eval", "no GPU") == own and plan.files("kernels", "no GPU") == []
    assert len(plan.files("eval")) == 22 and set(own) <= set(plan.files("eval"))
    assert plan.files("kernels") == ["kernels/gpu/one.json"]
    told = plan.line("this machine has no GPU")
    assert told.startswith("Of 35 results of the study 'check', 2 are published in ")
    assert told.endswith(
        "1 were measured here, 32 are missing and left out: this machine has no GPU"
    )
    assert plan.line().endswith("32 are missing and planned")


def test_records_of_other_devices_are_told_apart(tmp_path: Path) -> None:
    whole = study_of()
    write_study(whole, tmp_path / "r")
    publish(tmp_path / "r", tmp_path / "a")
    study = whole.model_copy(update={"published": str(tmp_path / "a")})
    timed = sum(1 for s in STAGES if s != "eval" for _ in cells_of(study, s, DEVICE))
    here = make_plan(study, DEVICE, tmp_path / "none")
    assert here.elsewhere == 0 and "of other devices" not in here.line()
    other = make_plan(study, "another-gpu", tmp_path / "none")
    assert other.elsewhere == timed
    assert other.line().endswith(f"; {timed} more are published of other devices")


@pytest.mark.fault(
    "records",
    "a study whose changed entry has the name of a published one",
    "refused while jobs are planned, file, line and record named",
)
def test_a_published_record_of_another_configuration_is_refused(tmp_path: Path) -> None:
    study = published(tmp_path)
    raw = study.model_dump(mode="json")
    raw["schemes"]["nuq3"]["outliers"] = 0.02
    with pytest.raises(UserError) as caught:
        make_plan(Study.model_validate(raw), DEVICE, tmp_path / "r")
    first, second = str(caught.value).splitlines()
    assert f"{tmp_path}/archive/eval/tiny/nuq3.jsonl:1: eval/tiny/nuq3/passkey/seed0" in first
    assert "measured with another configuration" in first and "seed1" in second


def test_default_studies_are_those_that_are_published(root: Path) -> None:
    for name, least in (("config", 1808), ("quality", 22)):
        study = load_study(root / f"config/{name}.yaml")
        assert study.published is not None
        study = study.model_copy(update={"published": str(root / study.published)})
        plan = make_plan(study, study.device, root / "results/none")
        assert len(plan.published) >= least, name
