"""The section reproduce: what of a published study is measured again, and where it is kept.

Also covers: study.measured_again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.study.config import parse_study
from kvquant.study.measured_again import measured_again, measured_seeds, quantizers_from
from kvquant.study.plan import make_plan, obstacle
from kvquant.study.publish import publish
from tests.support.studies import DEVICE, study_of, write_evaluation, write_study


def test_all_of_it_or_a_part() -> None:
    assert study_of(reproduce="true", published="p") == study_of(reproduce=True, published="p")
    whole = study_of(reproduce=True, published="p").reproduce
    assert whole is not None and whole.selects("eval", {"scheme": "nuq3", "seed": 1})
    assert not whole.selects("jobs", {"case": "one"})  # only where `stages` names them
    some = {"stages": ["eval", "energy"], "tasks": ["ppl"], "schemes": ["nuq3"], "seeds": ["1"]}
    part = study_of(reproduce=some, published="p").reproduce  # as Snakemake's --config has seeds
    assert part is not None and part.seeds == [1]
    asked = {"scheme": "nuq3", "task": "ppl", "seed": 1}
    assert part.selects("eval", asked)
    for other in ({"scheme": "fp16"}, {"task": "ruler"}, {"seed": 0}):
        assert not part.selects("eval", asked | other)
    assert part.selects("energy", {"scheme": "nuq3", "workload": "short", "rep": 0})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tasks": ["pasky"]}, "reproduce.tasks: 'pasky' is not among the tasks"),
        ({"schemes": ["nuq33"]}, "reproduce.schemes: 'nuq33' is not among the schemes"),
        ({"seeds": [7]}, "reproduce.seeds: 7 is no seed of the study; known: 0, 1"),
        ({"seeds": ["x"]}, "reproduce.seeds: 'x' is text"),
        ({"stages": ["speed"]}, "reproduce.stages.0"),
        ({"stages": []}, "reproduce.stages"),
        ({"quantizers": "none"}, "reproduce.quantizers"),
    ],
)
def test_what_is_unknown_is_refused_by_name(section: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as told:
        study_of(reproduce=section, published="p")
    assert message in str(told.value)


def test_folders_of_its_own_and_no_published_record_counts() -> None:
    plain = study_of(published="p", pathvars={"results": "r", "cache": "c"})
    assert measured_again(plain) is plain and measured_seeds(plain) == [0, 1]
    assert quantizers_from(plain) == "p"
    study = parse_study(plain.model_dump() | {"reproduce": {"seeds": [1]}})
    again = measured_again(study)
    assert again.published is None and again.reproduce is not None
    assert again.reproduce.published == "p" and measured_seeds(again) == [1]
    folders = {"results": "r-again", "logs": "logs/h100-again", "paper": "r-again/paper"}
    assert again.pathvars == folders | {"cache": "c"}
    assert measured_again(again) == again  # as jobs read it
    assert parse_study(again.model_dump()) == again
    assert quantizers_from(again) == "p"
    own = parse_study(plain.model_dump() | {"reproduce": {"quantizers": "own"}})
    assert quantizers_from(measured_again(own)) is None
    with pytest.raises(UserError, match="no published records to compare with"):
        measured_again(study_of(reproduce=True))


def test_the_plan_is_what_is_published_and_asked_for(tmp_path: Path) -> None:
    study = study_of(published=str(tmp_path / "a"))
    write_study(study, tmp_path / "first")
    publish(tmp_path / "first", tmp_path / "a")
    more = study.model_dump() | {"seeds": [0, 1, 2]}  # a seed that nobody has published
    asked = {"stages": ["eval", "kernels"], "tasks": ["ppl"], "schemes": ["fp16", "nuq3"]}
    again = measured_again(parse_study(more | {"reproduce": asked}))
    write_evaluation(again, tmp_path / "r", "tiny", "fp16", "ppl", 1)
    plan = make_plan(again, "another-gpu", tmp_path / "r")
    assert [cell.place for cell in plan.finished] == ["eval/tiny/fp16/ppl/seed1/run.json"]
    places = {cell.place for cell in plan.absent}
    nuq = {f"eval/tiny/nuq3/ppl/seed{seed}/run.json" for seed in (0, 1)}
    # timed under the name of the device at hand, though published of another
    assert places == nuq | {"eval/tiny/fp16/ppl/seed0/run.json", "kernels/another-gpu/one.json"}
    assert DEVICE != "another-gpu" and not plan.published
    assert plan.line().endswith(" again: 1 are there, 4 are missing")
    assert plan.line().startswith("Measuring 5 published results of ")


def test_who_can_measure_again() -> None:
    study = study_of(gpus=1, device="h200", published="p", reproduce=True)
    again = measured_again(study)
    assert "--config gpus=0 device=cpu measures on the processor" in obstacle(again, "cpu", False)
    assert "--config device=a100" in obstacle(again, "a100", False)
    assert obstacle(again, "h200", False) == "" and obstacle(again, "cpu", True) == ""
