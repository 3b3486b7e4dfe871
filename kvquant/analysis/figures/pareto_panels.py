"""The panels of the figure `pareto`: accuracy lost against each cost, a column per model.

A panel shows one cost of one named workload: ratios of different workloads are not comparable.
Energy is shown where counters measured it. Error bars: vertical the 95 % interval over seeds,
horizontal the spread of seeds (bits), of rounds and repetitions (speed), of trials and repetitions
(energy). A line joins the schemes that no other scheme beats in that panel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kvquant.analysis.labels import workload_label
from kvquant.analysis.pareto import counted, dominated
from kvquant.study.config import Study
from kvquant.study.suite import likelihood_suites
from kvquant.study.tasks import SUITES

MAX_WORKLOADS = 4  # panels of one cost; a page has room for no more


@dataclass(frozen=True)
class Panel:
    """One cost of one workload, for every model.

    Attributes:
        label: Text of the horizontal axis.
        more_is_better: The direction of the horizontal axis.
        points: Columns model, scheme, x, x_low, x_high, y, y_low, y_high.
    """

    label: str
    more_is_better: bool
    points: pd.DataFrame


def quality_task(study: Study) -> str | None:
    """Returns the task of the vertical axis: the first of perplexity, or else the first of all."""
    likelihoods = likelihood_suites()
    language = [name for name, task in study.tasks.items() if task.suite in likelihoods]
    return next(iter(language or study.tasks), None)


def quality_label(study: Study, task: str) -> str:
    """Returns the text of the vertical axis."""
    return f"{SUITES[study.tasks[task].suite].loss_axis}, {task}"


def quality(study: Study, evaluations: pd.DataFrame, tests: pd.DataFrame) -> pd.DataFrame:
    """Returns the loss of every scheme on :func:`quality_task`, with its interval over seeds."""
    task, rows = quality_task(study), []
    mine = evaluations[evaluations.task == task]
    for (model, scheme), group in mine.groupby(["model", "scheme"], sort=False):
        seeds = 8 * group.cache_bytes / group.cache_elements
        bits = 8 * group.cache_bytes.sum() / group.cache_elements.sum()
        row = {"model": model, "scheme": scheme, "bits": bits}
        row |= {"bits_low": seeds.min(), "bits_high": seeds.max()}
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
    return pd.DataFrame(rows, columns=[*_KEYS, "bits", "bits_low", "bits_high", *_Y])


_KEYS = ["model", "scheme"]
_Y = ["y", "y_low", "y_high"]
_X = ["x", "x_low", "x_high"]


def _speeds(rows: pd.DataFrame) -> dict[str, float]:
    """Returns the median prefill ratio over repetitions, and the spread of all their rounds."""
    ratio = rows.prefill_ratio.astype(float)
    ends = [rows.base_prefill_ms_median / rows[f"scheme_prefill_ms_{p}"] for p in ("p90", "p10")]
    spread = pd.concat([*ends, ratio]).astype(float)
    return dict(zip(_X, (ratio.median(), spread.min(), spread.max()), strict=True))


def _joules(rows: pd.DataFrame) -> dict[str, float]:
    """Returns the median energy ratio over repetitions, and the spread of trials."""
    ratio = rows.energy_ratio.astype(float)
    ends = [rows[c].astype(float) for c in ("energy_ratio_low", "energy_ratio_high") if c in rows]
    spread = pd.concat([*ends, ratio])
    return dict(zip(_X, (ratio.median(), spread.min(), spread.max()), strict=True))


def _ratios(study: Study, table: pd.DataFrame, workload: str, column: str) -> pd.DataFrame:
    """Returns a row per (model, scheme) with a ratio, and 1 for the baseline of such a model."""
    rows: list[dict[str, Any]] = []
    if column not in table:
        return pd.DataFrame(rows, columns=[*_KEYS, *_X])
    there = table[(table.workload == workload) & table[column].notna()]
    summary = _speeds if column == "prefill_ratio" else _joules
    for (model, scheme), group in there.groupby(_KEYS, sort=False):
        rows.append({"model": model, "scheme": scheme, **summary(group)})
    for model in dict.fromkeys(row["model"] for row in list(rows)):
        rows.append({"model": model, "scheme": study.baseline, **dict.fromkeys(_X, 1.0)})
    return pd.DataFrame(rows, columns=[*_KEYS, *_X])


def panels(
    study: Study,
    evaluations: pd.DataFrame,
    tests: pd.DataFrame,
    perf: pd.DataFrame,
    energy: pd.DataFrame,
) -> list[Panel]:
    """Returns the panels of the figure, without those that compare no scheme."""
    losses = quality(study, evaluations, tests)
    bits = losses.rename(columns=dict(zip(("bits", "bits_low", "bits_high"), _X, strict=True)))
    found = [Panel("bits per element, everything included", False, bits)]
    losses = losses[[*_KEYS, *_Y]]
    for table, column, words, spec in (
        (perf, "prefill_ratio", "prefill speed over 16 bits", study.throughput),
        (counted(energy), "energy_ratio", "energy per token over 16 bits", study.energy),
    ):
        for name, workload in list(spec.workloads.items())[:MAX_WORKLOADS]:
            points = _ratios(study, table, name, column).merge(losses, on=_KEYS)
            label = f"{words}\n{workload_label(workload)}\n({name})"
            found.append(Panel(label, column == "prefill_ratio", points))
    kept = []
    for panel in found:
        points = panel.points.dropna(subset=["x", "y"])
        if (points.scheme != study.baseline).any():
            kept.append(Panel(panel.label, panel.more_is_better, points))
    return kept


def draw(axis: Any, panel: Panel, model: str, looks: dict[str, tuple[str, str]]) -> None:
    """Draws one model's points of a panel, with bars and the frontier."""
    points = panel.points[panel.points.model == model]
    costs = np.column_stack([-points.x if panel.more_is_better else points.x, points.y])
    beaten = dominated(costs.astype(float)) if len(points) else np.zeros(0, dtype=bool)
    front = points[~beaten].sort_values(["x", "y"])
    axis.plot(front.x, front.y, color="#999999", lw=0.8, ls="--", zorder=2)
    for point, worse in zip(points.itertuples(), beaten, strict=True):
        color, marker = looks[point.scheme]
        bars = {}
        for side in "xy":
            at, low, high = (getattr(point, side + end) for end in ("", "_low", "_high"))
            if not np.isnan([low, high]).any():
                bars[f"{side}err"] = [[max(0.0, at - low)], [max(0.0, high - at)]]
        style = {"color": color, "mfc": "white" if worse else color, "zorder": 3}
        axis.errorbar(point.x, point.y, fmt=marker, elinewidth=0.8, capsize=2, **bars, **style)
    axis.axhline(0, color="#888888", linewidth=0.6, zorder=1)
    axis.margins(x=0.08)
    if not len(points):
        axis.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", size=7)
