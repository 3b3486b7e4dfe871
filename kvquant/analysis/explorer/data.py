"""The data of the explorer: names, looks, views and counts of a study as one JSON value."""

from __future__ import annotations

from typing import Any

from kvquant.analysis.claims import judge, named, readable
from kvquant.analysis.evidence import VERDICTS
from kvquant.analysis.explorer.measures import GROUPS, MIN_SHOWN
from kvquant.analysis.explorer.source import Source
from kvquant.analysis.explorer.timed_measures import all_measures
from kvquant.analysis.explorer.values import Column, Row, Sheet
from kvquant.analysis.explorer.view_list import View, shown
from kvquant.analysis.figures.style import looks
from kvquant.analysis.labels import device_label
from kvquant.analysis.page_list import PAGES
from kvquant.study.dotted import load
from kvquant.study.scheme_kinds import FAMILIES
from kvquant.study.tasks import SUITES


def claims(source: Source) -> Sheet:
    """Returns the table of claims, with the columns of the report's page."""
    table, heads = readable(named(source.study, judge(source.tables))), PAGES["claims"].heads
    keys = {source.labels.model(model): model for model in source.study.models}
    rows = [
        Row({name: str(row[name]) or "none" for name in heads}, model=keys.get(str(row["model"])))
        for _, row in table.iterrows()
    ]
    return Sheet([Column(name, head, text=True) for name, head in heads.items()], rows)


def axes(source: Source) -> list[dict[str, Any]]:
    """Returns the axes of the scatter: the measures of which at least two schemes have a number.

    A point is [model, scheme, cell]. Those without a number are listed by reason.
    """
    models, schemes = list(source.study.models), list(source.study.schemes)
    found = []
    in_groups = sorted(all_measures(source), key=lambda measure: GROUPS.index(measure.group))
    for measure in in_groups:
        if measure.measured < MIN_SHOWN:
            continue
        points: list[list[Any]] = []
        none: dict[str, list[list[int]]] = {}
        for (model, scheme), cell in measure.cells.items():
            where = [models.index(model), schemes.index(scheme)]
            if isinstance(cell, dict) and "no" in cell:
                none.setdefault(cell["no"], []).append(where)
            else:
                points.append([*where, cell])
        found.append(
            {
                "name": measure.name,
                "group": measure.group,
                "label": measure.label,
                "help": measure.help,
                "more": measure.more_is_better,
                "loss": measure.name.startswith("loss-"),
                **({} if measure.digits is None else {"digits": measure.digits}),
                "points": points,
                "none": none,
            }
        )
    return found


def counts(source: Source) -> list[dict[str, Any]]:
    """Returns how many results of each kind the study asks for, and how many there are.

    What was timed counts once, on however many devices that was.
    """
    study, t, models = source.study, source.tables, len(source.study.models)
    asked = {
        "evaluations": models * len(study.seeds) * len(study.eval_cells()),
        "throughput jobs": models * len(study.throughput_cells()),
        "energy jobs": models * len(study.energy_cells()),
        "cases of whole jobs": len(study.job_cases()),
        "kernel cases": len(study.kernel_cases()),
        "append jobs": study.append_reps(),
    }
    timed = ["model", "scheme", "workload", "rep"]
    there = {"evaluations": len(t.evaluations)}
    for what, table, keys in (
        ("throughput jobs", t.perf, timed),
        ("energy jobs", t.energy, timed),
        ("cases of whole jobs", t.jobs, ["case"]),
        ("kernel cases", t.kernels, ["case"]),
        ("append jobs", t.append, ["rep"]),
    ):
        there[what] = len(table.drop_duplicates(keys)) if len(table) else 0
    return [{"what": what, "there": there[what], "asked": n} for what, n in asked.items() if n]


def _view(source: Source, view: View) -> dict[str, Any]:
    made = load(view.make)(source)
    if isinstance(made, Sheet):
        made = made.to_json(list(source.study.schemes), list(source.study.models))
    facts = {"name": view.name, "label": view.label, "caption": view.caption}
    return {**facts, "kind": view.kind, "data": made}


def data_of(source: Source) -> dict[str, Any]:
    """Returns everything that the page shows."""
    study, labels, marked = source.study, source.labels, looks(source.study)
    suites = dict.fromkeys(task.suite for task in study.tasks.values())
    views = [_view(source, view) for view in shown(study)]
    return {
        "study": study.study,
        "title": study.title or study.study,
        "baseline": list(study.schemes).index(study.baseline),
        "models": [labels.model(model) for model in study.models],
        "schemes": [
            {
                "key": key,
                "name": labels.scheme(key),
                "family": spec.family,
                "color": marked[key][0],
                "marker": marked[key][1],
            }
            for key, spec in study.schemes.items()
        ],
        "families": list(FAMILIES),
        "suites": [[name, SUITES[name].label] for name in suites],
        "devices": [device_label(device) for device in source.tables.devices()],
        "counts": counts(source),
        "verdicts": list(VERDICTS),
        "views": views,
    }
