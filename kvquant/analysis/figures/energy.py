"""The figure `energy`: joules of whole jobs by part, and the shares of the parts and of idling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvquant.analysis.figures.style import (
    GREY,
    PAGE_WIDTH,
    SMALL,
    Look,
    NothingMeasuredError,
    grouped_rows,
    height_of_rows,
    legend,
    looks,
    most_lines,
    name_groups,
    name_rows,
    plt,
)
from kvquant.analysis.labels import job_label, labels_of
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study

LETTERS = 40  # of a line of a cache's name
# Column of the table `jobs`, its text on the axis, and what it is multiplied by.
PARTS = (
    ("joules_per_prompt_token", "J per 1,000 prompt tokens\n(less is better)", 1e3),
    ("joules_per_answer_token", "J per answer token\n(less is better)", 1.0),
)
# Segments of a bar in greys, for colors are schemes'.
SHARES: dict[str, dict[str, str]] = {
    "prefill": {"facecolor": "#4d4d4d"},
    "decoding": {"facecolor": "#a0a0a0", "hatch": "////"},
    "idle board": {"facecolor": "#e4e4e4"},
}
WIDE = 5.0  # largest over smallest joules from which a scale is logarithmic


def shares(jobs: pd.DataFrame) -> pd.DataFrame:
    """Returns the shares of prefill, decoding and the idle board in each job's joules.

    The board would draw its idle power without a job, too: that part of the joules is taken from
    those of prefill and of decoding, by their times.
    """
    prompts, answers = (jobs.batch_size * jobs[part] for part in ("prompt", "answer"))
    seconds = {
        "prefill": prompts / jobs.prefill_tokens_per_s,
        "decoding": answers / jobs.decode_tokens_per_s,
    }
    joules = {
        "prefill": jobs.joules_per_prompt_token * prompts,
        "decoding": jobs.joules_per_answer_token * answers,
    }
    total = joules["prefill"] + joules["decoding"]
    above = {part: joules[part] - jobs.idle_watts * seconds[part] for part in joules}
    idle = total - above["prefill"] - above["decoding"]
    return pd.DataFrame({part: j / total for part, j in (above | {"idle board": idle}).items()})


def measured(study: Study, jobs: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of jobs whose joules a counter measured, as the study has its cases."""
    rows = jobs[(jobs.status == "ok") & (jobs.source == "nvml")]
    order = {name: place for place, name in enumerate(study.job_cases())}
    return rows.sort_values("case", key=lambda names: names.map(order), kind="stable")


def _points(axis: Any, rows: pd.DataFrame, places: list[int], part: tuple[str, str, float],
            marked: dict[str, Look]) -> None:  # fmt: skip
    """Draws one part's joules with the range of trials, from 0 or on a logarithmic scale."""
    column, text, factor = part
    for place, row in zip(places, rows.to_dict("records"), strict=True):
        color, marker = marked[row["scheme"]]
        at = factor * row[column]
        low, high = (factor * row.get(f"{column}_{end}", row[column]) for end in ("low", "high"))
        ends = [[max(0.0, at - low)], [max(0.0, high - at)]]
        axis.errorbar(
            at, place, xerr=ends, fmt=marker, color=color, ms=4.5, capsize=2, elinewidth=0.9
        )
    if rows[column].max() > WIDE * rows[column].min():
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_xlabel(text)


def _bars(axis: Any, rows: pd.DataFrame, places: list[int]) -> None:
    """Draws the shares of each job's joules, with the job's joules per token beside them."""
    left = 0.0 * rows.joules_per_token
    for name, share in shares(rows).items():
        style = {"edgecolor": "white", "linewidth": 0.4, **SHARES[str(name)]}
        axis.barh(places, 100 * share, left=100 * left, height=0.62, **style)
        left = left + share
    for place, joules in zip(places, rows.joules_per_token, strict=True):
        axis.annotate(
            f"{joules:.3f}", (100, place), (3, 0), textcoords="offset points", va="center",
            fontsize=SMALL,
        )  # fmt: skip
    axis.set_xlim(0, 122)
    axis.set_xticks([0, 50, 100])
    axis.set_xlabel("share of the job, %, and J per\nprompt and answer token")


def draw(study: Study, tables: Path) -> Any:
    """Draws joules per prompt token, per answer token, and shares, a row per cache of a case."""
    rows = measured(study, one_device(study, read_table(tables, "jobs")))
    if not len(rows):
        raise NothingMeasuredError("figure energy: no whole job's joules were counted")
    names, cases, marked = labels_of(study), study.job_cases(), looks(study)
    shown = []
    for row in rows.itertuples():
        given = cases[row.case].batch_size is not None
        prompts = "" if given else f", {int(row.batch_size)} at once"
        shown.append((job_label(cases[row.case]), names.scheme(str(row.scheme)) + prompts))
    texts, places, heads = grouped_rows(shown)
    figure, axes = plt.subplots(
        1, 3, figsize=(PAGE_WIDTH, 0.7 + height_of_rows(len(texts), most_lines(texts, LETTERS))),
        sharey=True,
    )  # fmt: skip
    for axis, part in zip(axes, PARTS, strict=False):
        _points(axis, rows, places, part, marked)
    _bars(axes[2], rows, places)
    name_rows(axes[0], texts, LETTERS)
    name_groups(axes[0], heads)
    for axis in axes:
        axis.grid(axis="y", visible=False)
    patches = [plt.Rectangle((0, 0), 1, 1, label=name, ec=GREY, lw=0.4, **style)
               for name, style in SHARES.items()]  # fmt: skip
    legend(figure, patches, PAGE_WIDTH)
    return figure
