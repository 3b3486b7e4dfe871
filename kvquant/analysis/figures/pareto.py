"""The figure `pareto`: accuracy lost against bits, speed and energy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.analysis.figures import pareto_panels
from kvquant.analysis.figures.style import WIDTH, MaxNLocator, look, loss_scale, marks, plt
from kvquant.analysis.labels import scheme_labels
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.errors import UserError
from kvquant.study.config import Study


def draw(study: Study, tables: Path) -> Any:
    """Draws accuracy lost against bits, speed and energy: a column per model, a row per cost."""
    names = ("eval", "tests", "perf", "energy")
    found = pareto_panels.panels(
        study, *(one_device(study, read_table(tables, name)) for name in names)
    )
    if not found:
        raise UserError("figure pareto: no scheme has a finite difference to the baseline")
    models = list(study.models)
    wide = max(WIDTH, 2.7 * len(models))
    labels = scheme_labels(study)
    seen = set(pd.concat([panel.points for panel in found]).scheme)
    looks = {s: look(study, s) for s in study.schemes}
    handles = marks({labels[s]: looks[s] for s in study.schemes if s in seen})
    columns = max(1, int(wide / (0.35 + 0.052 * max(len(h.get_label()) for h in handles))))
    legend_rows = -(-len(handles) // columns)
    height = 0.5 + 1.85 * len(found) + 0.14 * legend_rows
    figure, axes = plt.subplots(
        len(found), len(models), figsize=(wide, height), sharey=True, squeeze=False
    )
    for row, panel in zip(axes, found, strict=True):
        for axis, model in zip(row, models, strict=True):
            pareto_panels.draw(axis, panel, model, looks)
            loss_scale(axis, "y")
            better = "more" if panel.more_is_better else "less"
            apart = "; " if "\n" in panel.label else "\n"  # a line fits the panel
            axis.set_xlabel(f"{panel.label}{apart}{better} is better")
            axis.xaxis.set_major_locator(MaxNLocator(5))
    if len(models) > 1:
        for axis, model in zip(axes[0], models, strict=True):
            axis.set_title(model, fontsize=7.5)
    task = pareto_panels.quality_task(study)
    assert task is not None
    label = pareto_panels.quality_label(study, task)
    figure.supylabel(f"{label} (less is better)", fontsize=7.5)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.0,
    )
    return figure
