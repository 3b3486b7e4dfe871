"""The figure `throughput`: prefill and decode speed over the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.analysis.figures.style import MARKERS, WIDTH, height_of_rows, look, marks, plt
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study


def _speed_marks(
    axis: Any, study: Study, perf: pd.DataFrame, part: str, schemes: list[str], workloads: list[str]
) -> None:
    """Draws one part of the speed of a model's schemes: all repetitions of a cell are one mark."""
    apart = min(0.25, 0.8 / max(1, len(workloads)))  # a scheme's workloads stay in its row
    for i, scheme in enumerate(schemes):
        color, _ = look(study, scheme)
        for w, workload in enumerate(workloads):
            rows = perf[(perf.scheme == scheme) & (perf.workload == workload)]
            if not len(rows):
                continue
            place = i + (w - (len(workloads) - 1) / 2) * apart
            ratios = rows[f"{part}_ratio"].astype(float)
            timed = rows[ratios.notna()]
            if not len(timed):
                if "scheme_status" in rows and (rows.scheme_status == "oom").any():
                    style = {"fontsize": 5.5, "va": "center", "color": "#666666"}
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
                fmt=MARKERS[w % len(MARKERS)],
                color=color,
                capsize=2,
                elinewidth=0.8,
                ms=4,
            )
    axis.axvline(1, color="#888888", linewidth=0.8)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(left=0)


def draw(study: Study, tables: Path) -> Any:
    """Draws prefill and decode speed over the baseline, by workload, a row of panels per model."""
    perf = one_device(study, read_table(tables, "perf"))
    workloads = list(dict.fromkeys(perf["workload"])) if len(perf) else []
    schemes = [s for s in study.schemes if s in set(perf["scheme"])] if len(perf) else []
    models = list(study.models)
    several = len(models) > 1
    one = max(1.9, 0.2 + height_of_rows(len(schemes)))
    size = (WIDTH, 0.4 + (one + 0.2) * len(models))
    figure, axes = plt.subplots(
        len(models), 2, figsize=size, sharey=True, sharex="col", squeeze=False
    )
    for row, model in zip(axes, models, strict=True):
        mine = perf[perf.model == model] if several else perf
        for axis, part in zip(row, ("prefill", "decode"), strict=True):
            _speed_marks(axis, study, mine, part, schemes, workloads)
            if axis is axes[-1][0] or axis is axes[-1][1]:
                axis.set_xlabel(part)
        if several:
            row[0].set_title(model, fontsize=7, loc="left")
        row[0].set_yticks(range(len(schemes)), schemes)
    axes[0][0].set_ylim(len(schemes) - 0.5, -0.5)
    figure.supxlabel("speed over fp16 (right of 1: faster)", fontsize=7.5)
    handles = marks(
        {name: ("#444444", MARKERS[w % len(MARKERS)]) for w, name in enumerate(workloads)}
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure
