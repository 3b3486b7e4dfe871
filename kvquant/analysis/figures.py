"""`kvquant plot`: the paper's figures, drawn from tables only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd

from kvquant.analysis import figure_list, pareto_figure
from kvquant.analysis.append_figure import append_panels
from kvquant.analysis.kernels_figure import (
    Looks,
    legend,
    peers_panel,
    rate_panel,
    rates,
    ratio_panel,
    ratios,
)
from kvquant.analysis.labels import scheme_labels
from kvquant.analysis.tables import read_table
from kvquant.errors import UserError, unknown
from kvquant.study.config import PasskeyTask, Study, load_study

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette without its yellow: told apart with every common colour vision.
COLORS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DEPTHS = 10  # rows of the passkey heat map
WIDTH = 3.4  # inches, one column of the paper
STYLE = {
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "kvquant",
    "figure.constrained_layout.use": True,
}


def _look(study: Study, scheme: str) -> tuple[str, str]:
    """Color and marker of a scheme; 7 colors and 8 markers make 56 different pairs."""
    index = list(study.schemes).index(scheme)
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]


def _loss_ticks(low: float, high: float) -> list[float]:
    """Numbers of an axis of losses: at least two, however small or large they are."""
    widest = max(abs(low), abs(high))
    if widest < 1:
        return [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    steps: list[float] = [0, 0.5, 1, 2, 5, 10, 20, 50, 100]
    if widest > 200:
        powers = int(np.log10(widest))
        steps = [0, *(10.0**k for k in range(0, powers + 1, 1 + powers // 5))]
    return [t for t in (*(-t for t in steps[:0:-1]), *steps) if low <= t <= high]


def _loss_scale(axis: Any, which: Literal["x", "y"]) -> None:
    """A scale for losses from nothing to a hundred: linear below 1, logarithmic above."""
    getattr(axis, f"set_{which}scale")("symlog", linthresh=1.0, linscale=0.7)
    axis.autoscale(axis=which)  # with margins of this scale, not of the linear one
    axis.margins(**{which: 0.06})
    low, high = getattr(axis, f"get_{which}lim")()
    ticks = _loss_ticks(low, high)
    getattr(axis, f"set_{which}ticks")(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


def pareto(study: Study, tables: Path) -> Any:
    """Accuracy lost against bits, speed and energy: a column per model, a row per workload."""
    names = ("eval", "tests", "perf", "energy")
    found = pareto_figure.panels(study, *(read_table(tables, name) for name in names))
    if not found:
        raise UserError("figure pareto: no scheme has a finite difference to the baseline")
    models = list(study.models)
    wide = max(WIDTH, 2.7 * len(models))
    labels = scheme_labels(study)
    seen = set(pd.concat([panel.points for panel in found]).scheme)
    looks = {s: _look(study, s) for s in study.schemes}
    handles = [
        plt.Line2D([], [], color=looks[s][0], marker=looks[s][1], linestyle="", label=labels[s])
        for s in study.schemes
        if s in seen
    ]
    columns = max(1, int(wide / (0.35 + 0.052 * max(len(h.get_label()) for h in handles))))
    legend_rows = -(-len(handles) // columns)
    height = 0.5 + 1.85 * len(found) + 0.14 * legend_rows
    figure, axes = plt.subplots(
        len(found), len(models), figsize=(wide, height), sharey=True, squeeze=False
    )
    for row, panel in zip(axes, found, strict=True):
        for axis, model in zip(row, models, strict=True):
            pareto_figure.draw(axis, panel, model, looks)
            _loss_scale(axis, "y")
            better = "more" if panel.more_is_better else "less"
            apart = "; " if "\n" in panel.label else "\n"  # a line fits the panel
            axis.set_xlabel(f"{panel.label}{apart}{better} is better")
            axis.xaxis.set_major_locator(MaxNLocator(5))
    if len(models) > 1:
        for axis, model in zip(axes[0], models, strict=True):
            axis.set_title(model, fontsize=7.5)
    task = pareto_figure.quality_task(study)
    assert task is not None
    label = pareto_figure.quality_label(study, task)
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


def _height(rows: int) -> float:
    """Inches of an axis with a named row for each scheme."""
    return 0.35 + 0.16 * rows


def perplexity(study: Study, tables: Path) -> Any:
    """Perplexity increase of every scheme, a panel a task: means with intervals, and each seed."""
    tests, values = read_table(tables, "tests"), read_table(tables, "eval")
    language = tests[tests.suite == "perplexity"]
    groups = list(language.groupby(["model", "task"], sort=False))
    # a scheme that cannot run a task's protocol has no row in its panel
    schemes = [[s for s in study.schemes if s in set(group.scheme)] for _, group in groups] or [[]]
    sizes = [_height(len(names)) + 0.1 for names in schemes]
    figure, axes = plt.subplots(
        len(sizes), 1, figsize=(WIDTH, 0.4 + sum(sizes)), sharex=True, squeeze=False,
        height_ratios=sizes,
    )  # fmt: skip
    for axis, ((model, task), group), names in zip(axes.flat, groups, schemes, strict=False):
        seeds = values[(values.model == model) & (values.task == task)]
        base = seeds[seeds.scheme == study.baseline].set_index("seed")["value"]
        for i, scheme in enumerate(names):
            row = group[group.scheme == scheme].iloc[0]
            color, marker = _look(study, scheme)
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
    _loss_scale(axes.flat[-1], "x")
    axes.flat[-1].set_xlabel("perplexity increase over fp16 (less is better)")
    return figure


def _speed_marks(
    axis: Any, study: Study, perf: pd.DataFrame, part: str, schemes: list[str], workloads: list[str]
) -> None:
    """One part of the speed of a model's schemes: all repetitions of a cell are one mark."""
    apart = min(0.25, 0.8 / max(1, len(workloads)))  # a scheme's workloads stay in its row
    for i, scheme in enumerate(schemes):
        color, _ = _look(study, scheme)
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


def throughput(study: Study, tables: Path) -> Any:
    """Prefill and decode speed over the baseline, by workload, a row of panels per model."""
    perf = read_table(tables, "perf")
    workloads = list(dict.fromkeys(perf["workload"])) if len(perf) else []
    schemes = [s for s in study.schemes if s in set(perf["scheme"])] if len(perf) else []
    models = list(study.models)
    several = len(models) > 1
    one = max(1.9, 0.2 + _height(len(schemes)))
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
    handles = [
        plt.Line2D(
            [], [], color="#444444", marker=MARKERS[w % len(MARKERS)], linestyle="", label=name
        )
        for w, name in enumerate(workloads)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def passkey(study: Study, tables: Path) -> Any:
    """Passkey accuracy by prompt length and depth of the key, one panel a scheme and model.

    A task of n samples a seed puts key `i` into the i-th of n equal parts of its filler.
    """
    figure_list.check(study, "passkey")
    samples = read_table(tables, "samples")
    tasks = {name: t for name, t in study.tasks.items() if isinstance(t, PasskeyTask)}
    lengths = sorted({task.length for task in tasks.values()})
    depths = min(DEPTHS, *(task.samples for task in tasks.values()))
    found = samples[samples.task.isin(tasks)]
    count = found.task.map(lambda name: tasks[name].samples).astype(int)
    found = found.assign(
        length=found.task.map(lambda name: tasks[name].length),
        depth=found["sample"].astype(int) * depths // count,
    )
    models = list(dict.fromkeys(found.model))
    schemes = [s for s in study.schemes if s in set(found.scheme)]
    panels = [(model, scheme) for model in models for scheme in schemes]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 0.5 + 1.15 * rows), sharex=True, sharey=True, squeeze=False
    )
    image = None
    for axis, (model, scheme) in zip(axes.flat, panels, strict=False):
        mine = found[(found.model == model) & (found.scheme == scheme)]
        grid = mine.pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
        grid = grid.reindex(index=range(depths), columns=lengths).to_numpy(dtype=float) * 100
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        title = scheme if len(models) == 1 else f"{model}\n{scheme}"
        widest = max(map(len, title.split("\n")))
        axis.set_title(title, fontsize=max(4.0, min(7.0, 80 / widest)))  # titles stay apart
        axis.grid(False)
        axis.set_xticks(range(len(lengths)), [f"{round(n / 1024, 1):g}K" for n in lengths])
        axis.set_yticks([-0.5, (depths - 1) / 2, depths - 0.5], ["0", "50", "100"])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=axes, label="accuracy, %", shrink=0.8)
    figure.supxlabel("prompt tokens", fontsize=7.5)
    figure.supylabel("depth of the key, %", fontsize=7.5)
    return figure


def append(study: Study, tables: Path) -> Any:
    """Cost of an appended token against the tokens already in the cache."""
    figure_list.check(study, "append")
    assert study.append is not None
    points = read_table(tables, "append")
    looks = {scheme: _look(study, scheme) for scheme in study.append_schemes()}
    chunks = study.append.chunks
    figure, axes = plt.subplots(
        len(chunks), 1, figsize=(WIDTH, 0.5 + 1.75 * len(chunks)), sharex=True, squeeze=False
    )
    append_panels(axes[:, 0], points, looks)
    figure.align_ylabels()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, frameon=False, handletextpad=0.4
    )
    return figure


def kernels(study: Study, tables: Path) -> Any:
    """Kernels against the rate of a copy, against fp16, and against peers."""
    figure_list.check(study, "kernels")
    rows = read_table(tables, "kernels")
    above, middle, peers = rates(rows), ratios(rows), rows[rows.role == "peer"]
    counts = [n for n in (len(above), len(middle), peers.side.nunique()) if n]
    if not counts:
        raise UserError("figure kernels: no kernel and no comparison has a time")
    heights = [_height(n) for n in counts]
    figure, axes = plt.subplots(
        len(counts), 1, figsize=(WIDTH, 0.9 + sum(heights)), height_ratios=heights, squeeze=False
    )
    left = iter(axes[:, 0])
    if above:
        rate_panel(next(left), above)
    if middle:
        ratio_panel(next(left), middle)
    _legend(figure, legend(rows, study.headline), "upper")
    if len(peers):
        _legend(figure, peers_panel(next(left), peers), "lower")
    return figure


def _legend(figure: Any, looks: Looks, where: Literal["upper", "lower"]) -> None:
    handles = [
        plt.Line2D([], [], color=color, marker=marker, linestyle="", ms=4, label=name)
        for name, (color, marker) in looks.items()
    ]
    place = f"outside {where} center"
    style = {"frameon": False, "handletextpad": 0.2, "columnspacing": 1.0}
    figure.legend(handles=handles, loc=place, ncols=3 if where == "upper" else 1, **style)


FIGURES: dict[str, Callable[[Study, Path], Any]] = {
    "pareto": pareto,
    "perplexity": perplexity,
    "throughput": throughput,
    "passkey": passkey,
    "append": append,
    "kernels": kernels,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant plot`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--figure", required=True, help=", ".join(FIGURES))
    parser.add_argument("--out", required=True, nargs="+", type=Path, help=".pdf, .svg or .png")


def run(args: argparse.Namespace) -> None:
    """Draws one figure into every file given."""
    if args.figure not in FIGURES:
        raise unknown("figure", args.figure, FIGURES)
    study = load_study(args.study)
    figure_list.check(study, args.figure)
    with plt.rc_context(STYLE):
        figure = FIGURES[args.figure](study, args.tables)
        for file in args.out:
            file.parent.mkdir(parents=True, exist_ok=True)
            # no dates: the same tables give the same file
            empty = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
            figure.savefig(file, dpi=300, metadata=empty.get(file.suffix))
            print(f"plot: {file}")
