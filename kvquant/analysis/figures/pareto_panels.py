"""The panels of the figure `pareto`: accuracy lost against size, memory, throughput and energy.

A panel shows one cost of one named workload, for costs of different workloads are not comparable.
Energy is shown where counters measured it. Error bars: vertical the 95 % interval over seeds,
horizontal the spread of seeds (sizes), of rounds and repetitions (throughput), of trials and
repetitions (energy). A line joins the schemes that no other scheme beats in that panel. A cost of
which there is no record has a panel that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns

from kvquant.analysis.figures.style import FRONTIER, Look, placeholder
from kvquant.analysis.labels import Labels, job_label
from kvquant.analysis.pareto import counted, dominated, first_task
from kvquant.study.config import Study
from kvquant.study.suite import likelihood_suites
from kvquant.study.tasks import SUITES
from kvquant.study.timing import Workload

MAX_WORKLOADS = 2  # panels of one cost; a page has room for no more
MIN_COMPARED = 4  # schemes in a case of whole jobs or a workload that stands for speed and energy
NOT_MEASURED = "not measured yet"  # the study has the measurement, but no record
NOT_ASKED = "not part of this study"
_KEYS = ["model", "scheme"]
_Y = ["y", "y_low", "y_high"]
_X = ["x", "x_low", "x_high"]


@dataclass(frozen=True)
class Panel:
    """One cost of one workload, for every model.

    Attributes:
        label: Text of the horizontal axis.
        more_is_better: The direction of the horizontal axis.
        points: Columns model, scheme, x, x_low, x_high, y, y_low, y_high.
        missing: Why there are no points.
        sizes: Whether the horizontal axis has sizes, which differ by factors.
    """

    label: str
    more_is_better: bool
    points: pd.DataFrame
    missing: str = NOT_MEASURED
    sizes: bool = False

    def __post_init__(self) -> None:
        """Leaves out points that lack a coordinate."""
        object.__setattr__(self, "points", self.points.dropna(subset=["x", "y"]))


def quality_task(study: Study, evaluations: pd.DataFrame) -> str | None:
    """Returns the task of the vertical axis: the first measured one of perplexity, or else of all.

    Of a study that measured nothing it is the first task.
    """
    language = first_task(study, evaluations, *likelihood_suites())
    first = first_task(study, evaluations, *SUITES) if language is None else language
    return next(iter(study.tasks), None) if first is None else first


def quality_label(study: Study, task: str, labels: Labels) -> str:
    """Returns the text of the vertical axis."""
    return f"{SUITES[study.tasks[task].suite].loss_axis}, {labels.task(task)}"


def quality(study: Study, evaluations: pd.DataFrame, tests: pd.DataFrame) -> pd.DataFrame:
    """Returns the loss of every scheme on :func:`quality_task`, with its interval over seeds.

    Columns besides are bits per element and bytes of the cache per token, with the seeds' ends.
    """
    task, rows = quality_task(study, evaluations), []
    mine = evaluations[evaluations.task == task]
    for (model, scheme), group in mine.groupby(_KEYS, sort=False):
        row: dict[str, Any] = {"model": model, "scheme": scheme}
        for name, factor, size in (("bits", 8, "cache_elements"), ("bytes", 1, "tokens")):
            seeds = factor * group.cache_bytes / group[size]
            row[name] = factor * group.cache_bytes.sum() / group[size].sum()
            row |= {f"{name}_low": seeds.min(), f"{name}_high": seeds.max()}
        loss = low = high = 0.0 if scheme == study.baseline else np.nan
        test = tests[
            (tests.level == "task")
            & (tests.task == task)
            & (tests.model == model)
            & (tests.scheme == scheme)
        ]
        if len(test):
            first = test.iloc[0]
            loss, low, high = first.difference, first.ci_low, first.ci_high
            if first.higher_is_better:
                loss, low, high = -loss, -high, -low
        rows.append(row | {"y": loss, "y_low": low, "y_high": high})
    sizes = [f"{name}{end}" for name in ("bits", "bytes") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*_KEYS, *sizes, *_Y])


def _sides(study: Study, there: pd.DataFrame, column: str) -> pd.DataFrame:
    """Returns a row per side of every job, with model, scheme and x; the baseline's of all jobs.

    Args:
        study: The study.
        there: Rows of one workload.
        column: Name of the cost without its side.
    """
    found = []
    for side, scheme in (("scheme", there.scheme), ("base", study.baseline)):
        if f"{side}_{column}" not in there:
            continue
        value = there[f"{side}_{column}"].astype(float)
        rows = pd.DataFrame({"model": there.model, "scheme": scheme, "x": value})
        part = column.removesuffix("_tokens_per_s")
        for end, percentile in (("x_low", "p90"), ("x_high", "p10")):
            times = [f"{side}_{part}_ms_{p}" for p in ("median", percentile)]
            rows[end] = value
            if column != part and set(times) <= set(there):
                # a speed is tokens over time: the slowest rounds give the lower end
                rows[end] = value * there[times[0]].astype(float) / there[times[1]].astype(float)
        for end in ("low", "high"):
            if f"{side}_{column}_{end}" in there:
                rows[f"x_{end}"] = there[f"{side}_{column}_{end}"].astype(float)
        found.append(rows)
    both = pd.concat(found) if found else pd.DataFrame(columns=[*_KEYS, *_X])
    return both[both.x.notna()]


def _costs(study: Study, table: pd.DataFrame, workload: str, column: str) -> pd.DataFrame:
    """Returns a row per (model, scheme): the median over jobs, and the ends of their spreads."""
    if "workload" not in table or not len(table):
        return pd.DataFrame(columns=[*_KEYS, *_X])
    sides = _sides(study, table[table.workload == workload], column)
    grouped = sides.groupby(_KEYS, sort=False)
    return grouped.agg(
        x=("x", "median"), x_low=("x_low", "min"), x_high=("x_high", "max")
    ).reset_index()


def _speed(workload: Workload, table: pd.DataFrame) -> tuple[str, str]:
    """Returns the column and the name of a workload's throughput: of the job, or of its parts."""
    if workload.answer and "scheme_job_tokens_per_s" in table:
        return "job_tokens_per_s", "whole job, tokens/s"
    if workload.answer:
        return "decode_tokens_per_s", "decode, tokens/s"
    return "prefill_tokens_per_s", "prefill, tokens/s"


def panels(
    study: Study,
    evaluations: pd.DataFrame,
    tests: pd.DataFrame,
    perf: pd.DataFrame,
    energy: pd.DataFrame,
    jobs: pd.DataFrame | None = None,
    *,
    labels: Labels,
) -> list[Panel]:
    """Returns the panels of the figure: sizes, then throughput and energy.

    These are of the case of whole jobs that compares most schemes, and of the model's own first
    workloads. A workload that no scheme has a record of has no panel, unless there is no other of
    its cost; beside whole jobs, a workload of few schemes has none either.
    """
    losses = quality(study, evaluations, tests)

    def size(name: str) -> pd.DataFrame:
        mine = dict(zip((name, f"{name}_low", f"{name}_high"), _X, strict=True))
        return losses.rename(columns=mine)[[*_KEYS, *_X, *_Y]]

    kilobytes = size("bytes")
    kilobytes[_X] = kilobytes[_X] / 1e3
    found = [
        Panel("bits per element, everything included", False, size("bits"), sizes=True),
        Panel("cache per token, kB", False, kilobytes, sizes=True),
    ]
    losses = losses[[*_KEYS, *_Y]]
    none = losses.iloc[:0].assign(**{x: [] for x in _X})
    speeds = []
    for name, workload in study.throughput.workloads.items():
        column, words = _speed(workload, perf)
        points = _costs(study, perf, name, column).merge(losses, on=_KEYS)
        speeds.append(Panel(f"{words}\n{labels.timed[name]}", True, points))
    joules, measured = [], counted(energy)
    for name in study.energy.workloads:
        points = _costs(study, measured, name, "joules_per_token").merge(losses, on=_KEYS)
        joules.append(Panel(f"J per token\n{labels.metered[name]}", False, points))
    estimated = len(energy) and not len(measured)
    reason = "estimated without counters" if estimated else _reason(energy, study.energy_cells())
    whole = _whole_jobs(study, jobs, losses)
    found += whole
    fewest = MIN_COMPARED if whole else 1

    def shown_of(costs: list[Panel]) -> list[Panel]:
        enough = [p for p in costs if len({*p.points.scheme} - {study.baseline}) >= fewest]
        return enough[:MAX_WORKLOADS]

    shown = shown_of(speeds)
    slow = _reason(perf, study.throughput_cells())
    if shown or not whole:
        found += shown or [Panel("throughput, tokens/s", True, none, slow)]
    shown = shown_of(joules)
    if shown or not whole:
        found += shown or [Panel("J per token", False, none, reason)]
    return _of_several_costs(study, found)


def _of_several_costs(study: Study, found: list[Panel]) -> list[Panel]:
    """Returns panels without schemes that have sizes alone and that others beat there.

    Where speed or energy was measured of no scheme, all are kept. The figure `quality` shows all.
    """
    timed = {s for p in found if not p.sizes for s in p.points.scheme} - {study.baseline}
    if not timed:
        return found
    kept = timed | {study.baseline}
    for panel in found:
        if panel.sizes:
            for _, points in panel.points.groupby("model", sort=False):
                kept |= set(points[~dominated(_costs_of(panel, points))].scheme)
    return [replace(p, points=p.points[p.points.scheme.isin(kept)]) for p in found]


def _costs_of(panel: Panel, points: pd.DataFrame) -> np.ndarray:
    """Returns cost and loss of points, `[points, 2]`, less of both being better."""
    costs = np.column_stack([-points.x if panel.more_is_better else points.x, points.y])
    return costs.astype(float)


def case_of_most(study: Study, jobs: pd.DataFrame) -> str | None:
    """Returns the measured case of whole jobs that compares most schemes on the same prompts.

    A case whose number of prompts is searched compares memory as well, and one of two schemes is no
    comparison of schemes.
    """
    cases = study.job_cases()
    there = {
        name: jobs[(jobs.case == name) & (jobs.status == "ok")].scheme.nunique()
        for name, case in cases.items()
        if case.given_prompts
    }
    best = max(there, key=lambda name: there[name], default=None)
    return best if best is not None and there[best] > MIN_COMPARED else None


def _whole_jobs(study: Study, jobs: pd.DataFrame | None, losses: pd.DataFrame) -> list[Panel]:
    """Returns the panels of throughput and energy of whole jobs, which have random weights.

    Speeds depend on shapes alone, so that every model has the same. The unquantized cache that is
    allocated once loses nothing either.
    """
    if jobs is None or jobs.empty or (name := case_of_most(study, jobs)) is None:
        return []
    mine = jobs[(jobs.case == name) & (jobs.status == "ok")]
    lossless = [s for s in dict.fromkeys(mine.scheme) if study.scheme(s).exact]
    known = set(zip(losses.model, losses.scheme, strict=True))
    more = [
        {"model": model, "scheme": scheme, "y": 0.0, "y_low": np.nan, "y_high": np.nan}
        for model in study.models
        for scheme in lossless
        if (model, scheme) not in known
    ]
    losses = pd.concat([losses, pd.DataFrame(more, columns=losses.columns)]) if more else losses
    found = []
    for column, words, most in (
        ("job_tokens_per_s", "whole job, tokens/s", True),
        ("joules_per_token", "whole job, J per token", False),
    ):
        counted_there = most or (mine.source == "nvml").any()
        if not counted_there or not mine[column].notna().any():
            continue
        points = mine[["scheme"]].assign(
            x=mine[column], x_low=mine[f"{column}_low"], x_high=mine[f"{column}_high"]
        )
        label = f"{words}\n{job_label(study.job_cases()[name])}"
        found.append(Panel(label, most, points.merge(losses, on="scheme")))
    return found


def _reason(table: pd.DataFrame, cells: Sequence[object]) -> str:
    """Returns why a cost has no point: what the study lacks, or what its records say."""
    if not cells:
        return NOT_ASKED
    statuses = table["scheme_status"] if "scheme_status" in table else pd.Series(dtype=object)
    return "out of memory" if (statuses == "oom").any() else NOT_MEASURED


def compares(study: Study, panel: Panel) -> bool:
    """Returns whether a panel shows another scheme than the baseline."""
    return bool((panel.points.scheme != study.baseline).any())


def _scatter(axis: Any, points: pd.DataFrame, looks: dict[str, Look], *, hollow: bool) -> None:
    if not len(points):
        return
    sns.scatterplot(
        data=points,
        x="x",
        y="y",
        hue="scheme",
        style="scheme",
        palette={s: looks[s][0] for s in points.scheme},
        markers={s: looks[s][1] for s in points.scheme},
        s=26,
        linewidth=0.3,
        legend=False,
        zorder=4,
        ax=axis,
    )
    if hollow:
        drawn = axis.collections[-1]
        drawn.set(edgecolor=drawn.get_facecolor(), facecolor="white", linewidth=1.0, zorder=3)


def draw(axis: Any, panel: Panel, model: str, looks: dict[str, Look], baseline: str) -> None:
    """Draws one model's points of a panel, with bars and the frontier."""
    points = panel.points[panel.points.model == model]
    if not (points.scheme != baseline).any():
        axis.set_xticks([])
        placeholder(axis, panel.missing)
        return
    beaten = dominated(_costs_of(panel, points))
    front = points[~beaten].sort_values(["x", "y"])
    axis.plot(front.x, front.y, color=FRONTIER, lw=1.0, zorder=2)
    for point in points.itertuples():
        bars = {}
        for side in "xy":
            at, low, high = (getattr(point, side + end) for end in ("", "_low", "_high"))
            if not np.isnan([low, high]).any():
                bars[f"{side}err"] = [[max(0.0, at - low)], [max(0.0, high - at)]]
        style = {"ecolor": looks[point.scheme][0], "elinewidth": 0.8, "capsize": 1.5, "zorder": 3}
        axis.errorbar(point.x, point.y, fmt="none", **bars, **style)
    for hollow in (True, False):
        _scatter(axis, points[beaten == hollow], looks, hollow=hollow)
    axis.axhline(0, color="#888888", linewidth=0.6, zorder=1)
    axis.margins(x=0.08)
