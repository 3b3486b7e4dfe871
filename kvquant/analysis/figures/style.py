"""What the figures share: colors and markers of schemes, the style, scales of losses, panels."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import matplotlib
import numpy as np

from kvquant.errors import UserError
from kvquant.study.config import Study

matplotlib.use("Agg")
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

Look = tuple[str, str]  # color and marker


class NothingMeasuredError(UserError):
    """Nothing of what a figure shows is measured yet: the figure then says so."""


BASELINE = "#000000"
# Seaborn's palette for color-blind readers, without its two lightest colors, then darker ones, so
# that every kind of scheme can have a color of its own.
_DARK = ("#332288", "#7a1f3d", "#6b7500", "#00504a", "#7b4ba6", "#8a3b00", "#3c4a5a", "#b0005a")
COLORS = (
    *(c for i, c in enumerate(sns.color_palette("colorblind").as_hex()) if i not in (6, 8)),
    *_DARK,
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "d")
# Names and markers of the backends of torch's fp16 attention.
BACKENDS = {
    "cudnn": ("cuDNN", "s"),
    "flash": ("flash", "^"),
    "efficient": ("memory-efficient", "v"),
}
GREY = "#666666"
FRONTIER = "#777777"
# How much of a marker is filled, where it stands for what was measured.
FILLS: tuple[Literal["full", "none", "left", "right", "bottom", "top"], ...] = (
    "full", "none", "left", "right", "bottom", "top",
)  # fmt: skip
WIDTH = 3.25  # inches, one column of the paper
PAGE_WIDTH, PAGE_HEIGHT = 6.6, 7.9  # inches; a larger figure would be scaled down
MAX_SIZES = 9  # numbers on an axis of sizes
SMALL = 7.0  # points, the smallest text
STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    "font.family": ["DejaVu Sans"],
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "axes.linewidth": 0.8,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#b0b0b0",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "kvquant",
    "figure.constrained_layout.use": True,
}


def _free(used: set[Look], color: str) -> Iterator[Look]:
    """Yields looks that no scheme has yet: those of a color first."""
    for one in (color, *COLORS, BASELINE):
        for marker in MARKERS:
            if (one, marker) not in used:
                yield one, marker


def looks(study: Study) -> dict[str, Look]:
    """Returns color and marker of every scheme, which all figures of the study give it.

    A color is a method (NUQ, KIVI, ...), black the unquantized caches. Schemes of one color have
    different markers. Only of more schemes than there are pairs do some look alike.
    """
    methods = dict.fromkeys(s.method() for s in study.schemes.values() if s.quantizes)
    colors = {method: COLORS[i % len(COLORS)] for i, method in enumerate(methods)}
    found: dict[str, Look] = {}
    for key in (study.baseline, *(k for k in study.schemes if k != study.baseline)):
        scheme = study.schemes[key]
        color = colors[scheme.method()] if scheme.quantizes else BASELINE
        found[key] = next(_free(set(found.values()), color), (color, MARKERS[0]))
    return {key: found[key] for key in study.schemes}


def method_looks(study: Study) -> dict[str, Look]:
    """Returns color and marker of every method, for curves that join the schemes of one.

    The color is that of the method's schemes (:func:`looks`); methods have different markers, so
    that curves are told apart in grey as well.
    """
    marked = looks(study)
    colors = {s.curve(): marked[key][0] for key, s in study.schemes.items() if s.quantizes}
    return {m: (c, MARKERS[i % len(MARKERS)]) for i, (m, c) in enumerate(colors.items())}


def wrapped(text: str, letters: int) -> str:
    """Returns a name in lines of about so many letters, which end at commas where they can."""
    lines: list[str] = []
    for piece in re.split(r"(?<=,) ", text):
        if lines and len(lines[-1]) + 1 + len(piece) <= letters:
            lines[-1] += f" {piece}"
        else:
            lines += textwrap.wrap(piece, letters, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines or [text])


def placeholder(axis: Any, text: str) -> None:
    """Writes why a panel shows nothing."""
    axis.annotate(
        text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", size=SMALL, color=GREY
    )


def loss_ticks(low: float, high: float) -> list[float]:
    """Returns the numbers of an axis of losses: at least two, however small or large they are."""
    widest = max(abs(low), abs(high))
    if widest < 1:
        return [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    steps: list[float] = [0, 0.5, 1, 2, 5, 10, 20, 50, 100]
    if widest > 50:  # numbers of three letters would touch those beside them
        steps = [0, 0.5, 1, 3, 10, 30, 100]
    if widest > 200:
        powers = int(np.log10(widest))
        steps = [0, *(10.0**k for k in range(0, powers + 1, 1 + powers // 5))]
    return [t for t in (*(-t for t in steps[:0:-1]), *steps) if low <= t <= high]


def loss_scale(axis: Any, which: Literal["x", "y"]) -> None:
    """Gives an axis a scale for losses: linear below 1, logarithmic above."""
    getattr(axis, f"set_{which}scale")("symlog", linthresh=1.0, linscale=0.7)
    axis.autoscale(axis=which)  # with margins of this scale, not of the linear one
    axis.margins(**{which: 0.06})
    low, high = getattr(axis, f"get_{which}lim")()
    ticks = loss_ticks(low, high)
    getattr(axis, f"set_{which}ticks")(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


def size_scale(axis: Any) -> None:
    """Gives a horizontal axis a logarithmic scale for sizes, with at least three numbers or so.

    It is called when all points are drawn. Where a scale of factors would name fewer than three
    sizes, they are named in equal steps.
    """
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [s * 10.0**power for power in powers for s in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > MAX_SIZES:
        ticks = [t for t in ticks if f"{t:e}"[:3] in ("1.0", "1.5", "2.0", "3.0", "5.0", "7.0")]
    if len(ticks) > MAX_SIZES:
        ticks = [t for t in ticks if f"{t:e}"[0] in "125" and f"{t:e}"[2] == "0"]
    if len(ticks) < 3:
        ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axis.set_xticks(ticks, [f"{tick:,.6g}" for tick in ticks])
    axis.minorticks_off()


def height_of_rows(rows: int, lines: int = 1) -> float:
    """Returns the inches of an axis with a named row for each scheme.

    Args:
        rows: Their number.
        lines: Lines of the longest name.
    """
    return 0.35 + rows * (0.15 if lines == 1 else 0.015 + 0.1 * lines)


def name_rows(axis: Any, names: list[str], letters: int = 25) -> None:
    """Names the rows of an axis, the first one on top.

    Args:
        axis: The axis.
        names: A name per row.
        letters: Letters of a line.
    """
    axis.set_yticks(range(len(names)), [wrapped(n, letters) for n in names], linespacing=0.95)
    axis.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def grouped_rows(rows: Iterable[tuple[str, str]]) -> tuple[list[str], list[int], dict[int, str]]:
    """Returns the names of rows, each group of which follows an empty row for its head.

    Args:
        rows: The group and the name of each row, those of a group together.

    Returns:
        The names of all rows, the place of each row given, and the groups by the place of their
        heads (:func:`name_groups`).
    """
    names: list[str] = []
    places: list[int] = []
    heads: dict[int, str] = {}
    last = None
    for group, name in rows:
        if group != last:
            heads[len(names)] = last = group
            names.append("")
        places.append(len(names))
        names.append(name)
    return names, places, heads


def name_groups(axis: Any, heads: dict[int, str]) -> None:
    """Writes the names of groups into the empty rows of :func:`grouped_rows`, from the left."""
    for place, head in heads.items():
        style = {"va": "center", "fontsize": SMALL, "weight": "bold", "zorder": 5}
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        where = axis.get_yaxis_transform()
        axis.text(0.01, place, head, transform=where, bbox=paper, **style)
    axis.set_yticks(*zip(*(
        (tick, label.get_text())
        for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        if tick not in heads
    ), strict=True))  # fmt: skip


def most_lines(names: list[str], letters: int = 25) -> int:
    """Returns the lines of the longest name of :func:`name_rows`."""
    return max((wrapped(n, letters).count("\n") + 1 for n in names), default=1)


def marks(names: dict[str, Look], **style: Any) -> list[Any]:
    """Returns handles of a legend: a marker in its color for each name.

    Args:
        names: Color and marker of each name.
        style: Further properties of the markers.
    """
    return [
        plt.Line2D([], [], color=color, marker=marker, linestyle="", label=name, **style)
        for name, (color, marker) in names.items()
    ]


def fill_marks(names: list[str]) -> list[Any]:
    """Returns handles of a legend in which the fill of a grey marker stands for a name."""
    return [
        plt.Line2D(
            [], [], color=GREY, marker="o", linestyle="", label=name, **filled(GREY, i), ms=5
        )
        for i, name in enumerate(names)
    ]


def filled(color: str, index: int) -> dict[str, Any]:
    """Returns the properties of a marker that show the measurement of that index."""
    fill = FILLS[index % len(FILLS)]
    edge = {"mec": color, "mew": 0.9}
    if fill == "none":  # white, which hides the bars behind it
        return {"fillstyle": "full", "mfc": "white", **edge}
    return {"fillstyle": fill, "mfc": color, "mfcalt": "white", **edge}


def legend(figure: Any, handles: list[Any], width: float, where: str = "upper center") -> int:
    """Draws a legend outside of the panels, in as many columns as fit, and returns its rows.

    Args:
        figure: The figure.
        handles: Of the legend.
        width: Inches of the figure.
        where: Its side of the figure.
    """
    longest = max(len(h.get_label()) for h in handles)
    columns = max(1, min(len(handles), int(width / (0.37 + 0.05 * longest))))
    figure.legend(
        handles=handles,
        loc=f"outside {where}",
        ncols=columns,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.0,
        labelspacing=0.3,
    )
    return -(-len(handles) // columns)
