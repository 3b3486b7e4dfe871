"""The figure `perplexity`: perplexity increase of every scheme, a panel per task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvquant.analysis.figures.style import WIDTH, height_of_rows, look, loss_scale, plt
from kvquant.analysis.tables import read_table
from kvquant.study.config import Study
from kvquant.study.tasks import SUITES

SUITE = "perplexity"


def draw(study: Study, tables: Path) -> Any:
    """Draws means with intervals and each seed of every scheme, a panel per model and task."""
    tests, values = read_table(tables, "tests"), read_table(tables, "eval")
    language = tests[tests.suite == SUITE]
    groups = list(language.groupby(["model", "task"], sort=False))
    # a scheme that cannot run a task's protocol has no row in its panel
    schemes = [[s for s in study.schemes if s in set(group.scheme)] for _, group in groups] or [[]]
    sizes = [height_of_rows(len(names)) + 0.1 for names in schemes]
    figure, axes = plt.subplots(
        len(sizes), 1, figsize=(WIDTH, 0.4 + sum(sizes)), sharex=True, squeeze=False,
        height_ratios=sizes,
    )  # fmt: skip
    for axis, ((model, task), group), names in zip(axes.flat, groups, schemes, strict=False):
        seeds = values[(values.model == model) & (values.task == task)]
        base = seeds[seeds.scheme == study.baseline].set_index("seed")["value"]
        for i, scheme in enumerate(names):
            row = group[group.scheme == scheme].iloc[0]
            color, marker = look(study, scheme)
            single = seeds[seeds.scheme == scheme].set_index("seed")["value"] - base
            axis.plot(single, [i + 0.3] * len(single), ".", color=color, ms=2.5, alpha=0.6)
            ends = [row.difference - row.ci_low], [row.ci_high - row.difference]
            style = {"color": color, "capsize": 2.0, "elinewidth": 0.9, "ms": 4}
            axis.errorbar(row.difference, i, xerr=ends, fmt=marker, **style)
        axis.axvline(0, color="#888888", linewidth=0.6, zorder=1)
        axis.set_title(task if len(study.models) == 1 else f"{model}, {task}", fontsize=7)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
    loss_scale(axes.flat[-1], "x")
    axes.flat[-1].set_xlabel(f"{SUITES[SUITE].loss_axis} over fp16 (less is better)")
    return figure
