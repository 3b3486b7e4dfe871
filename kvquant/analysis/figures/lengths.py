"""The figure `lengths`: speed and memory against the prompt's length and the number of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
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
    ("step_tokens_per_s", "decode, tokens/s", 1.0),
    ("peak_bytes", "peak memory, GB", 1e9),
)
MAX_COLUMNS = 3  # of panels; a page has room for no more
HEIGHT = 4.6  # inches
MAX_NAMES = 6  # of numbers on a horizontal axis

LINES: tuple[dict[str, Any], ...] = (
    {"linestyle": "-", "linewidth": 1.2, "markersize": 3.5},
    {"linestyle": (0, (3, 2)), "linewidth": 1.2, "markersize": 6.5, "markerfacecolor": "none"},
)


@dataclass(frozen=True)
class Series:
    """Cases that differ in one number alone, which is a column of the figure.

    Attributes:
        title: What the cases share.
        column: The column of the table `jobs` in which they differ.
        text: What it is, on the axis.
        cases: Their names.
    """

    title: str
    column: str
    text: str
    cases: tuple[str, ...]


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


def by_batch(study: Study) -> dict[tuple[str, int, int], list[str]]:
    """Returns the cases of several numbers of prompts, by shape and tokens of prompt and answer."""
    found: dict[tuple[str, int, int], dict[int, str]] = {}
    for name, case in study.job_cases().items():
        if case.batch_size is not None and case.given_prompts:
            key = (case.shape, case.prompt, case.answer)
            found.setdefault(key, {}).setdefault(case.batch_size, name)
    return {key: list(names.values()) for key, names in found.items() if len(names) > 1}


def series(study: Study) -> list[Series]:
    """Returns the columns of the figure: lengths of each shape, then numbers of prompts."""
    lengths = by_length(study)

    def shape_of(key: str) -> str:
        return key.upper().replace("-", " ")

    found = [
        Series(f"{shape_of(shape)}, one prompt", "prompt", "tokens of the prompt", tuple(names))
        for shape, names in lengths.items()
    ]
    found += [
        Series(
            f"{shape_of(shape)}, prompts of {short_count(prompt)}", "batch_size",
            "prompts at once", tuple(names),
        )
        for (shape, prompt, _), names in by_batch(study).items()
    ]  # fmt: skip
    return found[:MAX_COLUMNS]


def _apart(values: list[int]) -> list[int]:
    """Returns numbers on a logarithmic axis whose names do not touch, the largest among them."""
    kept: list[int] = []
    for value in sorted(values, reverse=True):
        apart = log2(max(values) / min(values)) / MAX_NAMES
        if not kept or log2(kept[-1] / value) >= apart:
            kept.append(value)
    return kept


def panel(
    axis: Any, rows: pd.DataFrame, against: str, column: str, unit: float,
    marked: Mapping[str, Look], names: Mapping[str, str],
) -> None:  # fmt: skip
    """Draws one quantity against a length or a number of prompts, a line per cache.

    Every second line is dashed and has larger hollow markers, so that of lines that coincide both
    are seen.

    Args:
        axis: The axis.
        rows: Rows of the table `jobs` of one series.
        against: The column of the horizontal axis.
        column: The quantity.
        unit: What it is divided by.
        marked: Color and marker of schemes.
        names: Names of schemes in the legend.
    """
    schemes = list(dict.fromkeys(rows.scheme))
    for scheme, mine in rows.groupby("scheme", sort=False):
        mine = mine[mine[column].notna()].sort_values(against)
        if not len(mine):
            continue
        color, marker = marked[str(scheme)]
        values = mine[column].astype(float) / unit
        style = LINES[schemes.index(scheme) % len(LINES)]
        axis.plot(
            mine[against], values, color=color, marker=marker, label=names[str(scheme)], **style
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(sorted(rows[against].unique())))
    axis.xaxis.set_minor_locator(NullLocator())
    named = _apart([int(v) for v in rows[against].unique()])
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: short_count(int(v)) if int(v) in named else "")
    )
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    highest = max((max(line.get_ydata()) for line in axis.lines), default=1.0)
    axis.set_ylim(0, 1.1 * highest)  # so that no marker is cut
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
    """Draws speed of prefill and decoding and memory, a column of panels per series."""
    jobs = one_device(study, read_table(tables, "jobs"))
    jobs = jobs[jobs.status == "ok"]
    jobs = jobs.assign(step_tokens_per_s=1e3 * jobs.batch_size / jobs.step_ms_median)
    shown = series(study)
    wide = WIDTH if len(shown) == 1 else PAGE_WIDTH
    figure, axes = plt.subplots(
        len(PANELS), len(shown), figsize=(wide, HEIGHT), sharex="col", squeeze=False
    )
    marked, names = looks(study), _names(study)
    for place, one in enumerate(shown):
        rows = jobs[jobs.case.isin(one.cases)]
        for row, (column, label, unit) in zip(axes, PANELS, strict=True):
            panel(row[place], rows, one.column, column, unit, marked, names)
            if not place:
                row[place].set_ylabel(label)
        axes[-1][place].set_xlabel(one.text)
        if len(shown) > 1:
            axes[0][place].set_title(one.title, loc="left")
    figure.align_ylabels()
    handles = {h.get_label(): h for axis in axes.flat for h in axis.lines}
    if handles:
        legend(figure, list(handles.values()), wide)
    return figure
