"""The explorer's data: every measurement once, what is missing said, names in place of keys.

Also covers: analysis.explorer.kernel_sheets, analysis.explorer.measures,
analysis.explorer.passkeys, analysis.explorer.schemes, analysis.explorer.source,
analysis.explorer.tasks, analysis.explorer.timed_measures, analysis.explorer.timed_sheets,
analysis.explorer.view_list.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis.collect import collect
from kvquant.analysis.explorer import timed_sheets, view_list
from kvquant.analysis.explorer.data import claims, data_of
from kvquant.analysis.explorer.kernel_sheets import kernels
from kvquant.analysis.explorer.source import load as read_source
from kvquant.analysis.explorer.timed_measures import all_measures
from kvquant.analysis.explorer.values import Row, Sheet
from kvquant.analysis.figures.style import looks
from kvquant.analysis.labels import labels_of
from kvquant.analysis.pareto import pareto_table
from kvquant.analysis.problems import Problems
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.analysis.tables import write_table
from kvquant.study.dotted import load
from tests.support.measured import Measured
from tests.support.studies import DEVICE, study_of, write_study


def sheets(measured: Measured) -> dict[str, Sheet]:
    """The tables of all views."""
    shown = [v for v in view_list.shown(measured.study) if v.kind == "table"]
    return {view.name: load(view.make)(measured.source) for view in shown}


def rows_of(measured: Measured, view: str, **cells: str) -> list[Row]:
    """The rows of a view that have these cells."""
    rows = sheets(measured)[view].rows
    return [row for row in rows if all(row.cells[k] == v for k, v in cells.items())]


def test_every_record_is_shown_once(measured: Measured) -> None:
    shown = Counter(row.cell for sheet in sheets(measured).values() for row in sheet.rows)
    del shown[None]
    assert max(shown.values()) == 1
    results, stages = measured.results, {"perf": "throughput", "energy": "energy"}
    files = [f.relative_to(results).parts for f in results.rglob("*.json")]
    there = {(kind, *place[:3]) for kind, *place in files if kind == "eval"}
    there |= {(stages[kind], *place[:4]) for kind, *place in files if kind in stages}
    assert len(there) > 20
    tables = measured.source.tables
    there |= {("jobs", r.device, r.case, r.scheme) for r in tables.jobs.itertuples()}
    there |= {("kernels", r.device, r.case, r.measure, r.side) for r in tables.kernels.itertuples()}
    there |= {
        ("append", r.device, r.series, str(r.chunk), str(r.tokens))
        for r in tables.append.itertuples()
    }
    absent = {("eval", "other", "kivi-4", "passkey"), ("energy", "-", "tiny", "kivi-4", "short")}
    absent |= {("jobs", "-", "rest", scheme) for scheme in ("fp16", "nuq3")}
    assert set(shown) - there == absent


def test_what_is_missing_says_so(measured: Measured) -> None:
    labels = labels_of(measured.study)
    (row,) = rows_of(
        measured, "tasks", model="Other model", scheme=labels.scheme("kivi-4"),
        task=labels.task("passkey"),
    )  # fmt: skip
    for column in ("bits", "value", "loss", "verdict", "p", "samples"):
        assert row.cells[column] == {"no": "not measured"}, column
    assert row.cells["seeds"] == "0 of 2"
    (timed,) = rows_of(
        measured, "workloads", model=labels.model("tiny"), scheme=labels.scheme("nuq3"),
        stage="throughput",
    )  # fmt: skip
    assert timed.cells["reps"] == "1 of 2"
    front = {(row.model, row.scheme): row.cells for row in sheets(measured)["schemes"].rows}
    assert front["other", "kivi-4"]["score-passkey"] == {"no": "not measured"}
    assert front["tiny", "kivi-4"]["score-longbench"] == {"no": "not asked"}
    assert front["tiny", "hf-quanto-4"]["score-perplexity"] == {"no": "cannot run protocol B"}
    counts = {c["what"]: (c["there"], c["asked"]) for c in measured.data["counts"]}
    assert counts["evaluations"][1] - counts["evaluations"][0] == 2  # seeds
    assert counts["throughput jobs"][1] - counts["throughput jobs"][0] == 1
    assert counts["cases of whole jobs"] == (1, 2)


def test_no_cell_is_empty_and_no_number_is_unfinished(measured: Measured) -> None:
    for name, sheet in sheets(measured).items():
        for row in sheet.rows:
            for column in sheet.columns:
                cell = row.cells[column.name]
                if isinstance(cell, dict):
                    assert cell.get("no") or math.isfinite(cell["v"]), (name, column)
                else:
                    assert cell != "" and cell == cell, (name, column, cell)
    json.dumps(measured.data, allow_nan=False)


def test_readers_see_names_and_no_keys(measured: Measured) -> None:
    names = [one["name"] for one in measured.data["schemes"]]
    assert names == list(labels_of(measured.study).schemes.values())
    assert len(set(names)) == len(names) and measured.data["models"] == ["tiny", "Other model"]
    keys = {"nuq3", "kivi-4", "hf-quanto-4", "ppl", "short", "7b-mha"}
    texts = {
        cell
        for sheet in sheets(measured).values()
        for row in sheet.rows
        for cell in row.cells.values()
        if isinstance(cell, str)
    }
    assert len(texts) > 50 and texts & keys == set()


def test_looks_are_those_of_the_figures_and_families_those_of_kinds(measured: Measured) -> None:
    marked = looks(measured.study)
    for one in measured.data["schemes"]:
        assert (one["color"], one["marker"]) == marked[one["key"]]
    assert [s["family"] for s in measured.data["schemes"]] == ["16-bit", "ours", "peers", "peers"]


def test_a_loss_above_zero_is_worse_and_has_the_tests_interval(measured: Measured) -> None:
    tests = measured.source.tables.tests
    compared = tests[tests.level == "task"]
    assert set(compared.higher_is_better) == {True, False}
    for row in compared.itertuples():
        (found,) = (
            r
            for r in sheets_of_tasks(measured)
            if r.cell == ("eval", row.model, row.scheme, row.task)
        )
        ends = [row.difference, row.sample_ci_low, row.sample_ci_high]
        if row.higher_is_better:
            ends = [-ends[0], -ends[2], -ends[1]]
        cell: Any = found.cells["loss"]
        assert [cell["v"], cell["lo"], cell["hi"]] == pytest.approx(ends, rel=1e-6)
        assert cell["lo"] <= cell["hi"] and found.cells["verdict"] == row.verdict
    for r in sheets_of_tasks(measured):
        if r.scheme == "fp16" and r.cell is not None:
            assert r.cells["loss"] == 0 and r.cells["verdict"] == "baseline"


def sheets_of_tasks(measured: Measured) -> list[Row]:
    """The rows of the evaluations."""
    return list(load(view_list.VIEWS["tasks"].make)(measured.source).rows)


def test_axes_compare_at_least_two_schemes(measured: Measured) -> None:
    axes = next(v["data"] for v in measured.data["views"] if v["kind"] == "scatter")
    groups = [axis["group"] for axis in axes]
    assert groups == sorted(
        groups, key=["size", "score", "loss", "speed", "energy", "memory"].index
    )
    assert {"size", "loss", "speed", "energy"} <= set(groups)
    assert len({axis["name"] for axis in axes}) == len(axes)
    pairs = len(measured.study.models) * len(measured.study.schemes)
    for axis in axes:
        absent = sum(len(where) for where in axis["none"].values())
        assert len(axis["points"]) + absent == pairs
        assert len({scheme for _, scheme, _ in axis["points"]}) >= 2


def test_memory_that_ran_out_and_estimates_are_said(measured: Measured) -> None:
    tables = measured.source.tables
    perf = tables.perf.assign(scheme_status="oom", prefill_ratio=None)
    energy = tables.energy.assign(source="estimated")
    jobs = tables.jobs.assign(status="oom", job_tokens_per_s=None, joules_per_token=None)
    changed = replace(tables, perf=perf, energy=energy, jobs=jobs)
    source = replace(measured.source, tables=changed)
    found = {m.name: m.cells["tiny", "nuq3"] for m in all_measures(source)}
    assert found["prefill-ratio-short"] == {"no": "out of memory"}
    assert found["energy-short"] == {"no": "estimated without counters"}
    assert found["job-tokens-per-s-two"] == {"no": "out of memory"}
    rows = timed_sheets.workloads(source).rows
    assert "estimated" in [r.cells["source"] for r in rows if r.cells["stage"] == "energy"]


def test_passkeys_are_the_evaluations_at_all_depths_and_at_each(measured: Measured) -> None:
    maps = next(v["data"] for v in measured.data["views"] if v["kind"] == "maps")
    values = measured.source.tables.evaluations.groupby(["model", "scheme", "task"]).value.mean()
    models, schemes = list(measured.study.models), list(measured.study.schemes)
    assert len(maps["depths"]) == 4 and len(maps["maps"]) == 2 * len(schemes)
    for one in maps["maps"]:
        key = (models[one["m"]], schemes[one["s"]], "passkey")
        whole, *each = one["rows"]
        if key == ("other", "kivi-4", "passkey"):
            assert whole == [{"no": "not measured"}] and all(r == whole for r in each)
        else:
            assert whole[0] == pytest.approx(values[key])
            assert sum(row[0] for row in each) / 4 == pytest.approx(values[key])


def test_claims_are_those_of_the_study(measured: Measured) -> None:
    rows = claims(measured.source).rows
    assert len(rows) > 5
    assert {str(row.cells["verdict"]) for row in rows} <= set(measured.data["verdicts"])


def test_a_study_has_the_views_of_its_sections() -> None:
    tasks = {"ppl": {"suite": "perplexity", "dataset": "essays", "window": 64, "windows": 3}}
    none: dict[str, Any] = {"throughput": {}, "energy": {}, "append": None, "kernels": None}
    shown = [view.name for view in view_list.shown(study_of(tasks=tasks, **none))]
    assert shown == ["schemes", "tasks", "scatter", "claims"]


def test_a_study_without_a_record_is_shown_as_such(measured: Measured) -> None:
    tables = measured.source.tables
    timed = {name: getattr(tables, name).iloc[:0] for name in ("perf", "energy", "append", "jobs")}
    none = replace(
        tables, evaluations=tables.evaluations.iloc[:0], tests=pd.DataFrame(),
        kernels=tables.kernels.iloc[:0],
        pareto=pareto_of_nothing(measured), **timed,
    )  # fmt: skip
    data = data_of(replace(measured.source, tables=none, samples=measured.source.samples.iloc[:0]))
    assert {count["there"] for count in data["counts"]} == {0}
    views = {view["name"]: view["data"] for view in data["views"]}
    assert views["scatter"] == []
    for name in ("tasks", "workloads", "jobs", "kernels", "appends"):
        assert len(views[name]["rows"]) > 0, name
        assert "not measured" in json.dumps(views[name]), name


def test_sides_without_a_cache_have_names(measured: Measured) -> None:
    """Attention of a prompt alone, and torch's in fp16, are no schemes."""
    table = measured.source.tables.kernels
    there = pd.concat([table.iloc[:1]] * 4).assign(
        case="one", measure="prompt-attention",
        side=["8-bit", "cudnn", "flash", "efficient"], role=["ours", *["fp16"] * 3],
    )  # fmt: skip
    tables = replace(measured.source.tables, kernels=there)
    rows = kernels(replace(measured.source, tables=tables)).rows
    assert [(row.cells["scheme"], row.cells["family"]) for row in rows[:4]] == [
        ("8-bit attention", "ours"),
        ("fp16 attention, cuDNN", "16-bit"),
        ("fp16 attention, flash", "16-bit"),
        ("fp16 attention, memory-efficient", "16-bit"),
    ]
    assert {row.cells["kernels"] for row in rows[:4]} == {"no cache"}


def pareto_of_nothing(measured: Measured) -> pd.DataFrame:
    """The table `pareto` without numbers."""
    table = measured.source.tables.pareto
    keys = ["model", "scheme", "quality_task"]
    return table.assign(**{c: float("nan") for c in table.columns if c not in keys})


def test_a_row_without_a_cell_is_refused(measured: Measured) -> None:
    sheet = claims(measured.source)
    cells = {name: cell for name, cell in sheet.rows[0].cells.items() if name != "verdict"}
    with pytest.raises(ValueError, match="no cell 'verdict'"):
        Sheet(sheet.columns, [Row(cells)]).to_json([], [])


def test_a_study_of_the_unquantized_cache_alone_has_a_page(tmp_path: Path) -> None:
    """Its table of tests has neither rows nor columns."""
    study = study_of(schemes={"fp16": {"kind": "fp16"}}, headline="fp16")
    write_study(study, tmp_path)
    tables = collect(study, tmp_path, DEVICE, Problems(present=True))
    tables["tests"] = compare_all(study, tables["eval"], tables["samples"])
    tables["pareto"] = pareto_table(study, tables["eval"], tables["perf"], tables["energy"])
    for name, table in tables.items():
        write_table(table, tmp_path / "tables" / f"{name}.parquet")
    found = data_of(read_source(study, tmp_path / "tables"))
    assert [scheme["key"] for scheme in found["schemes"]] == ["fp16"]
    rows = next(view["data"]["rows"] for view in found["views"] if view["name"] == "tasks")
    assert len(rows) == len(study.tasks)
