"""The figure `capacity`: tokens that fit in a budget of memory, with the formula's value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvquant.analysis.figures.style import (
    GREY,
    SMALL,
    WIDTH,
    Look,
    NothingMeasuredError,
    grouped_rows,
    height_of_rows,
    legend,
    looks,
    most_lines,
    name_groups,
    name_rows,
    placeholder,
    plt,
)
from kvquant.analysis.labels import gpus_label, labels_of
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study
from kvquant.study.jobs import SEARCHED, JobCase
from kvquant.study.wording import short_count

WORDS = dict(zip(SEARCHED, ("tokens held at once", "tokens of the longest prompt"), strict=True))
LETTERS = 30  # of a line of a cache's name
TICKS = 6  # numbers of tokens on an axis, at most


@dataclass(frozen=True)
class Row:
    """One cache in one budget of memory.

    Attributes:
        budget: The shape and its memory.
        scheme: Its key.
        tokens: What was found; NaN where memory did not hold a prompt.
        formula: What the formula says; NaN where it says nothing.
        over: `tokens` over those of the 16-bit cache that holds most; NaN for a 16-bit cache.
    """

    budget: str
    scheme: str
    tokens: float
    formula: float
    over: float


def budget(case: JobCase, memory_bytes: float) -> str:
    """Returns the name of a case's shape and memory, and of the prompts that fill it."""
    shape = case.shape.upper().replace("-", " ")
    gpus = f" on {gpus_label(case)}" if case.num_gpus > 1 else ""
    memory = f"{memory_bytes / 1e9:.0f}" if case.memory_gb is None else f"{case.memory_gb:g}"
    prompts = "" if case.context else f" {short_count(case.prompt)}"
    each = " each" if gpus and case.memory_gb is not None else ""  # otherwise the sum over GPUs
    return f"{shape}{prompts}{gpus} in {memory} GB{each}"


def found_rows(study: Study, jobs: pd.DataFrame, column: str) -> list[Row]:
    """Returns what one search found, budgets in the order of the study's cases.

    Args:
        study: The study.
        jobs: The table `jobs` of one device.
        column: One of :data:`kvquant.study.jobs.SEARCHED`.
    """
    rows = []
    for name, case in study.job_cases().items():
        mine = jobs[(jobs.case == name) & jobs[column].notna()]
        plain = [s for s in mine.scheme if not study.scheme(s).quantizes]
        most = mine[mine.scheme.isin(plain)][column].astype(float).max()
        for side in mine.itertuples():
            tokens = float(getattr(side, column))
            over = float("nan") if side.scheme in plain else tokens / most
            formula = float("nan") if pd.isna(side.formula_tokens) else float(side.formula_tokens)
            where = budget(case, float(side.memory_bytes))
            rows.append(Row(where, str(side.scheme), tokens, formula, over))
    return rows


def panel(axis: Any, rows: list[Row], marked: Mapping[str, Look], names: Mapping[str, str]) -> None:
    """Draws one search, a row per cache below the name of each budget."""
    shown = [(row.budget, names[row.scheme]) for row in rows]
    names_of_rows, places, heads = grouped_rows(shown)
    for row, place in zip(rows, places, strict=True):
        color, marker = marked[row.scheme]
        axis.plot(row.tokens, place, marker=marker, color=color, ms=4.5, zorder=4)
        if row.formula == row.formula:
            style = {"marker": "|", "mew": 1.3, "ms": 7, "color": GREY, "zorder": 3}
            axis.plot(row.formula, place, **style)
        if row.over == row.over:
            at = max(v for v in (row.tokens, row.formula) if v == v)
            axis.annotate(
                f"{row.over:.1f}\N{MULTIPLICATION SIGN}", (at, place), (5, 0),
                textcoords="offset points", va="center", fontsize=SMALL,
            )  # fmt: skip
    name_rows(axis, names_of_rows, LETTERS)
    name_groups(axis, heads)
    axis.set_xscale("log", base=2)
    axis.margins(x=0.14)
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=TICKS))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(round(v))))
    if not rows:
        placeholder(axis, "not measured")


def draw(study: Study, tables: Path) -> Any:
    """Draws what each search found, a panel each."""
    jobs, names = one_device(study, read_table(tables, "jobs")), labels_of(study).schemes
    found = {c: rows for c in WORDS if (rows := found_rows(study, jobs, c))}
    if not found:
        raise NothingMeasuredError("figure capacity: no search has found what fits")
    lines = {c: grouped_rows([(r.budget, names[r.scheme]) for r in r_]) for c, r_ in found.items()}
    heights = [height_of_rows(len(n), most_lines(n, LETTERS)) for n, *_ in lines.values()]
    figure, axes = plt.subplots(
        len(found), 1, figsize=(WIDTH, 0.35 + sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, (column, rows) in zip(axes[:, 0], found.items(), strict=True):
        panel(axis, rows, looks(study), names)
        axis.set_xlabel(f"{WORDS[column]} (more is better)", loc="right")
    handles = [
        plt.Line2D([], [], color=GREY, marker="o", linestyle="", ms=4.5, label="found"),
        plt.Line2D([], [], color=GREY, marker="|", mew=1.3, ms=7, ls="", label="by the formula"),
    ]
    legend(figure, handles, WIDTH)
    return figure
