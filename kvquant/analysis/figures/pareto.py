"""The figure `pareto`: accuracy lost against size, memory, throughput and energy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import FuncFormatter

from kvquant.analysis.figures import pareto_panels
from kvquant.analysis.figures.style import (
    PAGE_HEIGHT,
    PAGE_WIDTH,
    MaxNLocator,
    NothingMeasuredError,
    legend,
    looks,
    loss_scale,
    marks,
    plt,
    size_scale,
)
from kvquant.analysis.labels import labels_of
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study

PANEL = 1.75  # inches of a panel's height, where the page has room for it


def draw(study: Study, tables: Path) -> Any:
    """Draws accuracy lost against every cost, a row per cost and a column per model.

    The panels of one model stand in two columns.
    """
    labels, marked = labels_of(study), looks(study)
    names: tuple[str, ...] = ("eval", "tests", "perf", "energy")
    if study.jobs is not None:
        names = (*names, "jobs")
    read = [one_device(study, read_table(tables, name)) for name in names]
    found = pareto_panels.panels(study, *read, labels=labels)
    if not any(pareto_panels.compares(study, panel) for panel in found):
        raise NothingMeasuredError(
            "figure pareto: no scheme has a finite difference to the baseline"
        )
    points = pd.concat([panel.points for panel in found if len(panel.points)])
    compared = set(points[points.scheme != study.baseline].model)
    models = [model for model in study.models if model in compared]
    seen = set(points.scheme)
    handles = marks({labels.scheme(s): marked[s] for s in study.schemes if s in seen})
    columns = max(2, len(models))
    rows = len(found) if len(models) > 1 else -(-len(found) // columns)
    figure = plt.figure()
    under = 0.15 * legend(figure, handles, PAGE_WIDTH, "lower center") + 0.3
    figure.set_size_inches(PAGE_WIDTH, min(PANEL * rows + under, PAGE_HEIGHT))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    cells = (
        [(panel, models[0]) for panel in found]
        if len(models) == 1
        else [(panel, model) for panel in found for model in models]
    )
    for axis, (panel, model) in zip(axes.flat, cells, strict=False):
        pareto_panels.draw(axis, panel, model, marked, study.baseline)
        better = "more" if panel.more_is_better else "less"
        first, _, rest = panel.label.partition("\n")
        lines = [f"{first} ({better} is better)", rest]
        axis.set_xlabel("\n".join(filter(None, lines)))
        axis.set_ylabel("")
        if panel.sizes and axis.get_xticks().size:
            size_scale(axis)
        elif axis.get_xticks().size:
            axis.set_xlim(left=-0.03 * axis.get_xlim()[1])  # speeds and energies, seen from 0
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    for axis in axes.flat[len(cells) :]:
        axis.set_visible(False)
    loss_scale(axes[0][0], "y")  # all panels share it
    if len(models) > 1:
        for axis, model in zip(axes[0], models, strict=True):
            axis.set_title(labels.model(model))
    task = pareto_panels.quality_task(study, read[0])
    assert task is not None
    label = pareto_panels.quality_label(study, task, labels)
    figure.supylabel(f"{label} (less is better)", fontsize=7.5)
    return figure
