"""The figure `throughput`: prefill and decode speed over the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.analysis.figures.style import (
    FILLS,
    GREY,
    PAGE_HEIGHT,
    PAGE_WIDTH,
    SMALL,
    WIDTH,
    Look,
    fill_marks,
    filled,
    height_of_rows,
    legend,
    looks,
    most_lines,
    name_rows,
    placeholder,
    plt,
)
from kvquant.analysis.labels import labels_of
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study

LETTERS = 17  # of a line of a scheme's name


def _speed_marks(
    axis: Any, marked: dict[str, Look], perf: pd.DataFrame, part: str, schemes: list[str],
    workloads: list[str],
) -> None:  # fmt: skip
    """Draws one part of the speed of a model's schemes: all repetitions of a cell are one mark.

    A mark has the look of its scheme, and its fill stands for the workload.
    """
    apart = min(0.3, 0.8 / max(1, len(workloads)))  # a scheme's workloads stay in its row
    for i, scheme in enumerate(schemes):
        color, marker = marked[scheme]
        for w, workload in enumerate(workloads):
            rows = perf[(perf.scheme == scheme) & (perf.workload == workload)]
            if not len(rows):
                continue
            place = i + (w - (len(workloads) - 1) / 2) * apart
            ratios = rows[f"{part}_ratio"].astype(float)
            timed = rows[ratios.notna()]
            if not len(timed):
                if "scheme_status" in rows and (rows.scheme_status == "oom").any():
                    style = {"fontsize": SMALL, "va": "center", "color": GREY}
                    axis.annotate(
                        "out of memory", (0, place), (3, 0), textcoords="offset points", **style
                    )
                continue
            ratio = ratios.median()
            base = timed[f"base_{part}_ms_median"].astype(float)
            low, high = (base / timed[f"scheme_{part}_ms_{p}"] for p in ("p90", "p10"))
            low, high = min(low.min(), ratios.min()), max(high.max(), ratios.max())
            axis.errorbar(
                ratio,
                place,
                xerr=[[max(0.0, ratio - low)], [max(0.0, high - ratio)]],
                fmt=marker,
                color=color,
                capsize=1.5,
                elinewidth=0.8,
                ms=4.5,
                **filled(color, w),
            )
    axis.axvline(1, color="#888888", linewidth=0.8, zorder=1)
    axis.set_xlim(left=0)
    if not axis.containers and not axis.texts:
        placeholder(axis, "not measured")


def draw(study: Study, tables: Path) -> Any:
    """Draws prefill and decode speed over the baseline, by workload, a row of panels per model."""
    perf, labels, marked = (
        one_device(study, read_table(tables, "perf")),
        labels_of(study),
        looks(study),
    )
    timed = dict.fromkeys(perf["workload"]) if len(perf) else {}
    workloads = list(timed)[: len(FILLS)]
    schemes = [s for s in study.schemes if s in set(perf["scheme"])] if len(perf) else []
    names, models = [labels.scheme(s) for s in schemes], list(study.models)
    several = len(models) > 1
    one = max(1.9, 0.2 + height_of_rows(len(schemes), most_lines(names, LETTERS)))
    around = 0.5 + 0.15 * len(workloads)
    height, width = around + (one + 0.2) * len(models), WIDTH
    if several and height > PAGE_HEIGHT:  # models stand side by side
        height, width = around + one + 0.2, PAGE_WIDTH
    shape = (len(models), 2) if width == WIDTH else (1, 2 * len(models))
    figure, axes = plt.subplots(
        *shape, figsize=(width, height), sharey=True, sharex="col", squeeze=False
    )
    axes = axes.reshape(len(models), 2)
    rows = list(axes)
    for row, model in zip(rows, models, strict=True):
        mine = perf[perf.model == model] if several else perf
        for axis, part in zip(row, ("prefill", "decode"), strict=True):
            _speed_marks(axis, marked, mine, part, schemes, workloads)
            if row is rows[-1] or width == PAGE_WIDTH:
                axis.set_xlabel(part)
        if several:
            row[0].set_title(labels.model(model), loc="left")
        name_rows(row[0], names, LETTERS)
        row[1].grid(axis="y", visible=False)
    more = f"; first {len(workloads)} of {len(timed)} workloads" if timed.keys() - workloads else ""
    figure.supxlabel(f"speed over 16 bits (right of 1: faster{more})", fontsize=7.5)
    if workloads:
        legend(figure, fill_marks([labels.timed.get(w, w) for w in workloads]), width)
    return figure
