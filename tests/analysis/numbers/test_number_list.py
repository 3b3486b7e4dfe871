"""The numbers of the paper's text: which there are, and that each follows its own records alone.

Also covers: analysis.numbers.number, analysis.numbers.of_jobs, analysis.numbers.of_losses,
analysis.numbers.of_schemes, analysis.numbers.of_study, analysis.numbers.of_timings.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from kvquant.analysis.numbers import number_list
from kvquant.analysis.numbers.number import Number
from kvquant.analysis.pareto import pareto_table
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.analysis.tables import read_table
from kvquant.errors import UserError
from kvquant.study.config import Study, parse_study
from tests.support.tables import two_models, write_tables


def small(root: Path) -> Study:
    raw = two_models(root)
    raw["models"] = {"m": next(iter(raw["models"].values()))}
    raw["schemes"]["allocated-3"] = {"kind": "allocated", "bits": 3.4}
    raw["evaluation"]["schemes"] = ["fp16", "nuq3-1pct", "kivi-4", "allocated-3"]
    return parse_study(raw)


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    return small(root)


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("numbers")
    write_tables(study, found)
    return found


@pytest.fixture(scope="module")
def tables(study: Study, folder: Path) -> Tables:
    return load_tables(study, folder)


def numbers_of(tables: Tables) -> dict[str, Number]:
    return {number.key: number for number in number_list.all_numbers(tables)}


@pytest.fixture(scope="module")
def numbers(tables: Tables) -> dict[str, Number]:
    return numbers_of(tables)


def test_values_are_those_of_the_tables(tables: Tables, numbers: dict[str, Number]) -> None:
    rows = tables.evaluations
    mine = rows[(rows.scheme == "nuq3-1pct") & (rows.task == "ppl-wikitext2-b")]
    base = rows[(rows.scheme == "fp16") & (rows.task == "ppl-wikitext2-b")]
    number = numbers["nuq3-1pct.ppl-wikitext2-b-change"]
    assert number.value == f"{mine.value.mean() - base.value.mean():,.2f}"
    assert number.records == {*mine.record, *base.record}
    assert numbers["nuq3-1pct.ppl-wikitext2-b"].records == {*mine.record}
    ours = rows[(rows.scheme == "allocated-3") & (rows.task == "ppl-wikitext2-b")]
    ratio = numbers["allocated-3.over.nuq3-1pct.ppl-wikitext2-b"]
    lost, theirs = (side.set_index("seed").value - base.set_index("seed").value
                    for side in (ours, mine))  # fmt: skip
    assert ratio.value == f"{(lost / theirs).mean():.2f}"
    assert ratio.records == {*ours.record, *mine.record, *base.record}
    assert numbers["nuq3-1pct.p16384-b1.prefill"].value == f"{_median(tables):.2f}"
    assert int(numbers["claims"].value) == sum(
        int(n.value) for key, n in numbers.items() if key.startswith("claims.")
    )


def _median(tables: Tables) -> float:
    rows = tables.perf[(tables.perf.scheme == "nuq3-1pct") & (tables.perf.workload == "p16384-b1")]
    return float(rows.prefill_ratio.median())


def test_one_changed_record_changes_the_numbers_that_rest_on_it_alone(
    study: Study, folder: Path, tables: Tables, numbers: dict[str, Number]
) -> None:
    evaluations, samples = tables.evaluations.copy(), read_table(folder, "samples")
    at = evaluations.index[
        (evaluations.scheme == "kivi-4")
        & (evaluations.task == "ppl-wikitext2-b")
        & (evaluations.seed == 1)
    ]
    (old,) = evaluations.loc[at, "record"]
    evaluations.loc[at, "value"] *= 1.5
    evaluations.loc[at, "record"] = "0" * 12
    mine = (samples.scheme == "kivi-4") & (samples.task == "ppl-wikitext2-b") & (samples.seed == 1)
    samples.loc[mine, "score"] += 0.4
    changed = replace(
        tables,
        evaluations=evaluations,
        tests=compare_all(study, evaluations, samples),
        pareto=pareto_table(study, evaluations, tables.perf, tables.energy),
    )
    after = numbers_of(changed)
    assert set(after) == set(numbers)
    told = {key for key, number in after.items() if number.records != numbers[key].records}
    moved = {key for key, number in after.items() if number.value != numbers[key].value}
    assert told == {key for key, number in numbers.items() if old in number.records}
    assert moved <= told
    assert {"kivi-4.ppl-wikitext2-b", "kivi-4.ppl-wikitext2-b-change"} <= moved
    assert "kivi-4.passkey" not in told and "nuq3-1pct.ppl-wikitext2-b" not in told


def test_whole_jobs_are_compared_with_the_best_16_bit_cache(root: Path, tmp_path: Path) -> None:
    raw = two_models(root)
    raw["jobs"] = {
        "cases": {
            "job": {"shape": "7b-mha", "prompt": 4096, "answer": 32, "batch_size": 1,
                    "schemes": ["fp16", "nuq3-1pct"]}
        }
    }  # fmt: skip
    study = parse_study(raw)
    write_tables(study, tmp_path)
    numbers = numbers_of(load_tables(study, tmp_path))
    assert numbers["jobs.job.nuq3-1pct.job-ratio"].value == "3.00"
    assert numbers["jobs.job.nuq3-1pct.job-ratio-low"].value == "2.94"
    assert numbers["jobs.job.nuq3-1pct.joules-saved"].value == "67"
    assert numbers["jobs.job.fp16.step"].value == "10.6"
    assert "jobs.job.fp16.job-ratio" not in numbers
    assert numbers["jobs.job.fp16.step"].records == numbers["jobs.job.nuq3-1pct.step"].records


def test_of_several_models_each_has_its_name(root: Path, tmp_path: Path) -> None:
    study = parse_study(two_models(root))
    write_tables(study, tmp_path)
    keys = set(numbers_of(load_tables(study, tmp_path)))
    for model in study.models:
        assert {f"{model}.nuq3-1pct.bits", f"{model}.nuq3-1pct.p16384-b1.prefill"} <= keys


def test_a_key_of_two_numbers_is_refused(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that names it could show the wrong one."""
    first = number_list.SOURCES["study"]
    monkeypatch.setattr(number_list, "load", lambda name: lambda t: iter(_twice(name)))
    monkeypatch.setattr(number_list, "SOURCES", {"study": first, "schemes": first})
    with pytest.raises(UserError, match=r"numbers: 'a\.bits' stands for two numbers"):
        number_list.all_numbers(tables)


def _twice(name: str) -> list[Number]:
    _twice.calls = getattr(_twice, "calls", 0) + 1  # type: ignore[attr-defined]
    return [Number("a.bits", str(_twice.calls))]  # type: ignore[attr-defined]


def test_a_case_that_another_device_timed_is_shown_as_its(tables: Tables) -> None:
    side = {
        **{"measure": "attention", "side": "cudnn", "role": "fp16", "status": "ok"},
        **{"shape": "7b-mha", "batch": 1, "tokens": 1024, "all_tokens": 1024, "record": "0a1b"},
        **{"over_ours_median": 2.5, "over_ours_p10": 2.4, "over_ours_p90": 2.6, "ms_median": 1.0},
    }
    own = {**side, "device": tables.study.device, "case": "one"}
    other = {**side, "device": "h200", "over_ours_median": 1.5}
    rows = [own, {**other, "case": "one"}, {**other, "case": "two"}]
    found = numbers_of(replace(tables, kernels=pd.DataFrame(rows)))
    assert found["kernels.two.device"].value == "H200"
    assert found["kernels.two.attention.cudnn.over"].value == "1.50"
    # What was timed on the study's device stays its own.
    assert found["kernels.one.device"].value != "H200"
    assert found["kernels.one.attention.cudnn.over"].value == "2.50"
