"""The figure `ablation`: loss of likelihood by the value of each option that a study varies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from kvquant.analysis.ablation import Ablation, drawable, task_of
from kvquant.analysis.figures.style import (
    GREY,
    MARKERS,
    PAGE_HEIGHT,
    PAGE_WIDTH,
    WIDTH,
    legend,
    looks,
    placeholder,
    plt,
    wrapped,
)
from kvquant.analysis.labels import labels_of
from kvquant.analysis.pareto import bits_of
from kvquant.analysis.tables import read_table
from kvquant.study.config import Study
from kvquant.study.tasks import SUITES

COLUMNS = 3  # panels beside each other
PERCENT = " %"
APART = 0.12  # of the markers of two models at one value
LETTERS = 84  # of a line of text as wide as the page


def losses(values: pd.DataFrame, baseline: str, scheme: str) -> np.ndarray:
    """Returns the losses of a scheme, one per seed that the baseline has, too.

    Args:
        values: Rows of the table `eval` of one model and task.
        baseline: The key of the baseline.
        scheme: The key of the scheme.
    """
    base = values[values.scheme == baseline].set_index("seed")["value"]
    mine = values[values.scheme == scheme].set_index("seed")["value"]
    return (mine - base).dropna().to_numpy(dtype=float)


def _measured(study: Study, values: pd.DataFrame, scheme: str) -> bool:
    """Returns whether a scheme has a loss on some model."""
    models = [values[values.model == model] for model in study.models]
    return any(len(losses(mine, study.baseline, scheme)) for mine in models)


def _panel(
    axis: Any, study: Study, ablation: Ablation, values: pd.DataFrame, markers: Mapping[str, str],
    color: str, letters: int,
) -> None:  # fmt: skip
    """Draws the losses by the value of one option, a marker per model and value.

    Args:
        axis: The axis.
        study: The study.
        ablation: The option.
        values: Rows of the table `eval` of the task.
        markers: A marker per model.
        color: The color of the headline scheme.
        letters: Letters of a line of text as wide as the panel.
    """
    words, title = [choice.words for choice in ablation.choices], ablation.label
    if all(text.endswith(PERCENT) for text in words):  # said once, as ticks are close
        words, title = [text.removesuffix(PERCENT) for text in words], f"{title},{PERCENT}"
    axis.set_title(wrapped(title, letters))
    in_lines = [wrapped(text, letters // len(words)) for text in words]
    most = max(text.count("\n") for text in in_lines)
    # values of fewer lines are filled up, so that bits stand in one line
    labels = [text + "\n" * (most - text.count("\n")) for text in in_lines]
    highest, lowest = 0.0, 0.0
    for at, (model, marker) in enumerate(markers.items()):
        mine = values[values.model == model]
        aside = (at - (len(markers) - 1) / 2) * APART
        means = []
        for place, choice in enumerate(ablation.choices):
            found = losses(mine, study.baseline, choice.scheme)
            if not len(found):
                labels[place] += "\n-"
                means.append(np.nan)
                continue
            mean, ours = float(found.mean()), choice.scheme == study.headline
            means.append(mean)
            highest, lowest = max(highest, *found), min(lowest, *found)
            labels[place] += f"\n{bits_of(mine[mine.scheme == choice.scheme]):.2f}"
            axis.errorbar(
                place + aside, mean, yerr=[[mean - found.min()], [found.max() - mean]],
                fmt=marker, color=color, mfc=color if ours else "white", mew=0.9, ms=4.5,
                elinewidth=0.9, capsize=1.5, zorder=3,
            )  # fmt: skip
            if ours:
                axis.axhline(mean, color=GREY, linestyle=":", linewidth=0.8, zorder=1)
        if ablation.ordered:
            places = [place + aside for place in range(len(means))]
            axis.plot(places, means, color=color, linewidth=0.8, zorder=2)
    axis.set_xticks(range(len(labels)), labels, linespacing=1.05)
    for tick, choice in zip(axis.get_xticklabels(), ablation.choices, strict=True):
        if choice.scheme == study.headline:
            tick.set_fontweight("bold")
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.grid(axis="x", visible=False)
    room = 0.1 * (highest - lowest) or 1.0
    axis.set_ylim(lowest - room if lowest < 0 else 0, highest + room)
    axis.yaxis.set_major_locator(MaxNLocator(4))


def draw(study: Study, tables: Path) -> Any:
    """Draws a panel per option of which several values were measured, bits below the values."""
    task = task_of(study)
    assert task is not None  # a condition of the figure
    values = read_table(tables, "eval")
    values = values[values.task == task]
    there = {scheme for scheme in study.schemes if _measured(study, values, scheme)}
    shown = [a for a in drawable(study) if sum(c.scheme in there for c in a.choices) > 1]
    if not shown:
        figure, axis = plt.subplots(figsize=(WIDTH, 0.8))
        axis.axis("off")
        placeholder(axis, "of no option a second value is measured yet")
        return figure
    columns = min(COLUMNS, len(shown))
    rows, width = -(-len(shown) // columns), WIDTH if columns == 1 else PAGE_WIDTH
    color, marker = looks(study)[study.headline]
    markers = dict(zip(study.models, (MARKERS * len(study.models)), strict=False))
    if len(markers) == 1:
        markers = dict.fromkeys(markers, marker)
    letters = round(LETTERS * width / PAGE_WIDTH) // columns
    one = 1.4 + 0.11 * len(markers)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, min(0.4 + one * rows, PAGE_HEIGHT)), squeeze=False
    )
    for axis, ablation in zip(axes.flat, shown, strict=False):
        _panel(axis, study, ablation, values, markers, color, letters)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    labels = labels_of(study)
    suite = SUITES[study.tasks[task].suite]
    below = "\n" if rows == 1 else " "  # one row is about as high as the text is long
    figure.supylabel(f"{suite.loss_axis}{below}(less is better)", fontsize=7.5)
    figure.supxlabel(
        wrapped(f"value of the option, and bits per element below, on {labels.task(task)}",
                letters * columns),
        fontsize=7.5,
    )  # fmt: skip
    if len(markers) > 1:
        handles = [
            plt.Line2D([], [], color=color, marker=one, linestyle="", label=labels.model(model))
            for model, one in markers.items()
        ]
        legend(figure, handles, width)
    return figure
