"""The figure `lengths`: one prompt and its answer against the prompt's length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kvquant.analysis.figures.style import PAGE_WIDTH, WIDTH, Look, legend, looks, placeholder, plt
from kvquant.analysis.labels import labels_of
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study
from kvquant.study.wording import short_count

# Column of the table `jobs`, its unit on the axis, and what divides it.
PANELS = (
    ("prefill_tokens_per_s", "prefill, tokens/s", 1.0),
    ("step_ms_median", "decode step, ms", 1.0),
    ("peak_bytes", "peak memory, GB", 1e9),
)

LINES: tuple[dict[str, Any], ...] = (
    {"linestyle": "-", "linewidth": 1.2, "markersize": 3.5},
    {"linestyle": (0, (3, 2)), "linewidth": 1.2, "markersize": 6.5, "markerfacecolor": "none"},
)


def by_length(study: Study) -> dict[str, list[str]]:
    """Returns the cases of one prompt on one GPU in all memory, by shape, of several lengths.

    Of cases whose prompts are equally long, which differ in their answers, the first is shown.
    """
    cases, found = study.job_cases(), dict[str, list[str]]()
    for name, case in cases.items():
        if case.batch_size != 1 or not case.given_prompts:
            continue
        there = found.setdefault(case.shape, [])
        if case.prompt not in {cases[other].prompt for other in there}:
            there.append(name)
    return {s: names for s, names in found.items() if len({cases[n].prompt for n in names}) > 1}


def panel(
    axis: Any, rows: pd.DataFrame, column: str, unit: float, marked: Mapping[str, Look],
    names: Mapping[str, str],
) -> None:  # fmt: skip
    """Draws one quantity against the prompt's length, a line per cache.

    Every second line is dashed and has larger hollow markers, so that of lines that coincide both
    are seen.

    Args:
        axis: The axis.
        rows: Rows of the table `jobs` of one shape.
        column: The quantity.
        unit: What it is divided by.
        marked: Color and marker of schemes.
        names: Names of schemes in the legend.
    """
    schemes = list(dict.fromkeys(rows.scheme))
    for scheme, mine in rows.groupby("scheme", sort=False):
        mine = mine[mine[column].notna()].sort_values("prompt")
        if not len(mine):
            continue
        color, marker = marked[str(scheme)]
        values = mine[column].astype(float) / unit
        style = LINES[schemes.index(scheme) % len(LINES)]
        axis.plot(
            mine.prompt, values, color=color, marker=marker, label=names[str(scheme)], **style
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(sorted(rows.prompt.unique())))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(int(v))))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    axis.set_ylim(bottom=0)
    if not axis.lines:
        placeholder(axis, "not measured")


def _names(study: Study) -> dict[str, str]:
    """Returns the names of schemes in the legend, the growing cache with how it is decoded."""
    names = dict(labels_of(study).schemes)
    return names | {
        key: f"{names[key]} (growing, from Python)"
        for key, scheme in study.schemes.items()
        if scheme.kind == "fp16"
    }


def draw(study: Study, tables: Path) -> Any:
    """Draws speed of prefill and decoding and memory, a column of panels per shape."""
    jobs = one_device(study, read_table(tables, "jobs"))
    jobs = jobs[jobs.status == "ok"]
    shapes = by_length(study)
    wide = WIDTH if len(shapes) == 1 else PAGE_WIDTH
    figure, axes = plt.subplots(
        len(PANELS), len(shapes), figsize=(wide, 5.2), sharex="col", squeeze=False
    )
    marked, names = looks(study), _names(study)
    for place, (shape, cases) in enumerate(shapes.items()):
        rows = jobs[jobs.case.isin(cases)]
        for row, (column, label, unit) in zip(axes, PANELS, strict=True):
            panel(row[place], rows, column, unit, marked, names)
            if not place:
                row[place].set_ylabel(label)
        axes[-1][place].set_xlabel("tokens of the prompt")
        if len(shapes) > 1:
            axes[0][place].set_title(shape.upper().replace("-", " "), loc="left")
    figure.align_ylabels()
    handles = {h.get_label(): h for axis in axes.flat for h in axis.lines}
    if handles:
        legend(figure, list(handles.values()), wide)
    return figure
