"""The figure `quality`: loss against bits per element, a curve per method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.analysis.figures.kept_tokens import Kept, kept_tokens
from kvquant.analysis.figures.pareto_panels import quality, quality_label, quality_task
from kvquant.analysis.figures.style import (
    GREY,
    PAGE_WIDTH,
    Look,
    NothingMeasuredError,
    loss_scale,
    method_looks,
    plt,
    size_scale,
)
from kvquant.analysis.labels import labels_of
from kvquant.analysis.tables import read_table
from kvquant.study.config import Study

HEIGHT = 3.0  # inches of a panel
LINES: dict[Kept, dict[str, Any]] = {
    "same": {"linestyle": "-", "linewidth": 1.2, "markersize": 4.5},
    "other": {"linestyle": (0, (3, 2)), "linewidth": 0.9, "markersize": 4.5, "mfc": "white"},
}
NAMES: dict[Kept, str] = {
    "same": "16-bit tokens as ours",
    "other": "16-bit tokens as published, or none",
}


def curves(study: Study, losses: pd.DataFrame) -> dict[tuple[str, Kept], pd.DataFrame]:
    """Returns the points of every curve of one model by method and 16-bit tokens, by bits.

    Args:
        study: The study.
        losses: Rows of one model of :func:`kvquant.analysis.figures.pareto_panels.quality`.
    """
    headline, found = study.schemes[study.headline], dict[tuple[str, Kept], list[Any]]()
    for row in losses.dropna(subset=["bits", "y"]).to_dict("records"):
        scheme = study.schemes[str(row["scheme"])]
        kept = kept_tokens(scheme, headline) if scheme.quantizes else None
        if kept is not None:
            found.setdefault((scheme.curve(), kept), []).append(row)
    return {key: pd.DataFrame(rows).sort_values("bits") for key, rows in found.items()}


def panel(
    axis: Any, drawn: Mapping[tuple[str, Kept], pd.DataFrame], marked: Mapping[str, Look]
) -> None:
    """Draws the curves of one model, those with the same 16-bit tokens as ours on top."""
    for (method, kept), points in drawn.items():
        color, marker = marked[method]
        order = 4 if kept == "same" else 3
        ends = [(points.y - points.y_low).clip(lower=0), (points.y_high - points.y).clip(lower=0)]
        bars = {"ecolor": color, "elinewidth": 0.8, "capsize": 1.5, "zorder": order}
        axis.errorbar(points.bits, points.y, yerr=ends, fmt="none", **bars)
        style = {"color": color, "marker": marker, "zorder": order, **LINES[kept]}
        axis.plot(points.bits, points.y, **style)
    axis.axhline(0, color="#888888", linewidth=0.6, zorder=1)
    size_scale(axis)


def draw(study: Study, tables: Path) -> Any:
    """Draws loss against bits, a panel per model side by side."""
    evaluations = read_table(tables, "eval")
    losses = quality(study, evaluations, read_table(tables, "tests"))
    models = [m for m in study.models if m in set(losses.model)]
    drawn = {m: found for m in models if (found := curves(study, losses[losses.model == m]))}
    if not drawn:
        raise NothingMeasuredError(
            "figure quality: no scheme has a finite difference to the baseline"
        )
    labels, task = labels_of(study), quality_task(study, evaluations)
    assert task is not None
    methods = dict.fromkeys(method for found in drawn.values() for method, _ in found)
    marked = method_looks(study)
    figure, axes = plt.subplots(
        1, len(drawn), figsize=(PAGE_WIDTH, HEIGHT), sharey=True, squeeze=False
    )
    for axis, (model, found) in zip(axes[0], drawn.items(), strict=True):
        panel(axis, found, marked)
        axis.set_xlabel("bits per element, everything included")
        if len(drawn) > 1:
            axis.set_title(labels.model(model))
    loss_scale(axes[0][0], "y")
    axes[0][0].set_ylabel(f"{quality_label(study, task, labels)}\n(less is better)")
    kept = [k for k in NAMES if any(k == key for found in drawn.values() for _, key in found)]
    handles = [
        plt.Line2D([], [], color=marked[m][0], marker=marked[m][1], ms=4.5, label=m)
        for m in methods
    ]
    handles += [
        plt.Line2D([], [], color=GREY, marker="o", label=NAMES[k], **LINES[k]) for k in kept
    ]
    figure.legend(
        handles=handles,
        loc="outside right upper",
        frameon=False,
        handlelength=2.2,
    )
    return figure
