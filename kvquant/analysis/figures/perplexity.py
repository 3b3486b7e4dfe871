"""The figure `perplexity`: perplexity increase of every scheme, a panel per task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvquant.analysis.figures.kept_tokens import without_variants
from kvquant.analysis.figures.style import (
    PAGE_HEIGHT,
    WIDTH,
    NothingMeasuredError,
    height_of_rows,
    looks,
    loss_scale,
    most_lines,
    name_rows,
    plt,
    wrapped,
)
from kvquant.analysis.labels import labels_of
from kvquant.analysis.tables import read_table
from kvquant.study.config import Study
from kvquant.study.tasks import SUITES

SUITE = "perplexity"
TITLE = 36  # letters of a line
LETTERS = (25, 36)  # of a name, the second where names of two lines are too high for a page


def draw(study: Study, tables: Path) -> Any:
    """Draws means with intervals and each seed of every scheme, a panel per model and task."""
    tests, values = read_table(tables, "tests"), read_table(tables, "eval")
    language = tests[tests.suite == SUITE]
    groups = list(language.groupby(["model", "task"], sort=False))
    if not groups:
        raise NothingMeasuredError("figure perplexity: no scheme was compared with the baseline")
    # a scheme that cannot run a task's protocol has no row in its panel
    schemes = [
        without_variants(study, [s for s in study.schemes if s in set(group.scheme)])
        for _, group in groups
    ]
    labels, marked = labels_of(study), looks(study)
    shown = [[labels.scheme(s) for s in names] for names in schemes]
    for letters in LETTERS:
        sizes = [height_of_rows(len(names), most_lines(names, letters)) + 0.1 for names in shown]
        if 0.4 + sum(sizes) <= PAGE_HEIGHT:
            break
    figure, axes = plt.subplots(
        len(sizes), 1, figsize=(WIDTH, min(0.4 + sum(sizes), PAGE_HEIGHT)), sharex=True,
        squeeze=False, height_ratios=sizes,
    )  # fmt: skip
    for axis, ((model, task), group), names in zip(axes.flat, groups, schemes, strict=False):
        seeds = values[(values.model == model) & (values.task == task)]
        base = seeds[seeds.scheme == study.baseline].set_index("seed")["value"]
        for i, scheme in enumerate(names):
            row = group[group.scheme == scheme].iloc[0]
            color, marker = marked[scheme]
            single = seeds[seeds.scheme == scheme].set_index("seed")["value"] - base
            axis.plot(single, [i + 0.3] * len(single), ".", color=color, ms=2.5, alpha=0.6)
            ends = [row.difference - row.ci_low], [row.ci_high - row.difference]
            style = {"color": color, "capsize": 2.0, "elinewidth": 0.9, "ms": 4}
            axis.errorbar(row.difference, i, xerr=ends, fmt=marker, **style)
        axis.axvline(0, color="#888888", linewidth=0.6, zorder=1)
        of_model = [] if len(study.models) == 1 else [labels.model(model)]
        # over the panel alone, beside which the names of schemes take a third of the column
        axis.set_title(wrapped(", ".join([*of_model, labels.task(task)]), TITLE))
        name_rows(axis, [labels.scheme(s) for s in names], letters)
    loss_scale(axes.flat[-1], "x")
    axes.flat[-1].set_xlabel(f"{SUITES[SUITE].loss_axis} (less is better)", loc="right")
    return figure
