"""Panels of whole jobs in the figure of accuracy against cost.

Also covers: analysis.figures.pareto_panels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.analysis.figures import pareto, pareto_panels
from kvquant.analysis.labels import TIMES, labels_of
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.analysis.tables import write_table
from kvquant.study.config import Study
from tests.support.studies import study_of
from tests.support.tables import accuracy_tables, job_table, write_tables

ALL = ["fp16-static", "fp16", "nuq4", "nuq3", "nuq2"]
CASE: dict[str, Any] = {"shape": "7b-mha", "prompt": 4096, "answer": 32, "schemes": ALL}
SCHEMES: dict[str, Any] = {
    "fp16": {"kind": "fp16"},
    "fp16-static": {"kind": "fp16-static"},
    **{f"nuq{b}": {"kind": "nuq", "bits": b, "outliers": 0.01} for b in (4, 3, 2)},
}


def study(**cases: dict[str, Any]) -> Study:
    given = cases or {
        "two": CASE | {"batch_size": 4, "schemes": ALL[1:3]},
        "fits": CASE | {"memory_gb": 40},
        "all": CASE | {"batch_size": 4, "energy": True},
    }
    return study_of(schemes=SCHEMES, evaluation={"schemes": ALL[1:]}, jobs={"cases": given})


def whole(asked: Study, jobs: pd.DataFrame) -> list[pareto_panels.Panel]:
    evaluations, samples = accuracy_tables(asked)
    tests = compare_all(asked, evaluations, samples)
    none = pd.DataFrame()
    found = pareto_panels.panels(
        asked, evaluations, tests, none, none, jobs, labels=labels_of(asked)
    )
    return [panel for panel in found if panel.label.startswith("whole job")]


def test_the_case_with_most_schemes_gives_speed_and_energy() -> None:
    asked = study()
    speed, energy = whole(asked, job_table(asked))
    assert speed.label == f"whole job, tokens/s\n7B MHA 4 {TIMES} 4K + 32"
    assert energy.label.startswith("whole job, J per token")
    assert (speed.more_is_better, energy.more_is_better) == (True, False)
    for panel, ours, base in ((speed, 12_000, 4_000), (energy, 0.04, 0.12)):
        points = panel.points.set_index("scheme")
        assert set(points.index) == set(ALL)
        assert (points.x.round(6) == [ours if "nuq" in s else base for s in points.index]).all()
        assert (points.x_low < points.x).all() and (points.x < points.x_high).all()
        assert list(points.loc[["fp16", "fp16-static"]].y) == [0, 0]
        assert points.y["nuq2"] > points.y["nuq4"] > 0


def test_energy_that_no_counter_measured_has_no_panel() -> None:
    asked = study()
    jobs = job_table(asked)
    for source in ("estimated", None):
        assert [p.more_is_better for p in whole(asked, jobs.assign(source=source))] == [True]


def test_a_case_of_few_schemes_or_without_records_has_no_panel() -> None:
    asked = study(two=CASE | {"batch_size": 4, "schemes": ALL[1:3]})
    assert whole(asked, job_table(asked)) == []
    jobs = job_table(study())
    assert whole(study(), jobs[jobs.case != "all"]) == []
    assert whole(study(), pd.DataFrame()) == []
    failed = jobs.assign(status=jobs.status.where(jobs.scheme.str.startswith("fp16"), "oom"))
    assert whole(study(), failed) == []


def test_the_figure_has_a_panel_for_each_cost(tmp_path: Path) -> None:
    asked = study()
    write_tables(asked, tmp_path)
    figure = pareto.draw(asked, tmp_path)
    said = " ".join(axis.get_xlabel() for axis in figure.axes)
    assert "whole job, tokens/s (more is better)" in said
    assert "whole job, J per token (less is better)" in said
    assert "not part of this study" not in " ".join(
        text.get_text() for axis in figure.axes for text in axis.texts
    )


def test_schemes_of_sizes_alone_are_shown_where_nothing_beats_them(tmp_path: Path) -> None:
    """A scheme that no panel of speed or energy has would be a mark that says nothing of cost."""
    more = SCHEMES | {"nuq3-sink0": {"kind": "nuq", "bits": 3, "sinks": 0}}
    asked = study_of(
        schemes=more,
        evaluation={"schemes": [*ALL[1:], "nuq3-sink0"]},
        jobs={"cases": {"all": CASE | {"batch_size": 4, "energy": True}}},
    )
    evaluations, samples = accuracy_tables(asked)
    none = pd.DataFrame()

    def shown(bits: float, jobs: pd.DataFrame | None) -> set[str]:
        mine = evaluations.scheme == "nuq3-sink0"
        sized = evaluations.assign(cache_bytes=evaluations.cache_bytes.mask(mine, int(bits * 1e6)))
        tests = compare_all(asked, sized, samples)
        found = pareto_panels.panels(asked, sized, tests, none, none, jobs, labels=labels_of(asked))
        return set(found[0].points.scheme)

    jobs = job_table(asked)
    assert "nuq3-sink0" not in shown(8.0, jobs)  # more bits than NUQ with a sink, and more loss
    assert "nuq3-sink0" in shown(2.0, jobs)
    assert "nuq3-sink0" in shown(8.0, None)  # nothing was timed


def test_a_model_without_a_comparison_has_no_column(tmp_path: Path) -> None:
    models = {name: {"source": "local", "path": name} for name in ("one", "two")}
    asked = study_of(schemes=SCHEMES, evaluation={"schemes": ALL[1:]}, models=models)
    write_tables(asked, tmp_path)
    both = len(pareto.draw(asked, tmp_path).axes)
    tests = pd.read_parquet(tmp_path / "tests.parquet")
    write_table(tests[tests.model == "two"], tmp_path / "tests.parquet")
    figure = pareto.draw(asked, tmp_path)
    assert len(figure.axes) <= both
    assert not [axis for axis in figure.axes if axis.get_title() == "one"]
