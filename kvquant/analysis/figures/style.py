"""What the figures share: colors and markers of schemes, the style, scales of losses."""

from __future__ import annotations

from typing import Any, Literal

import matplotlib
import numpy as np

from kvquant.study.config import Study

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette without its yellow: told apart with every common colour vision.
COLORS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
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


def look(study: Study, scheme: str) -> tuple[str, str]:
    """Returns color and marker of a scheme; 7 colors and 8 markers make 56 different pairs."""
    index = list(study.schemes).index(scheme)
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]


def loss_ticks(low: float, high: float) -> list[float]:
    """Returns the numbers of an axis of losses: at least two, however small or large they are."""
    widest = max(abs(low), abs(high))
    if widest < 1:
        return [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    steps: list[float] = [0, 0.5, 1, 2, 5, 10, 20, 50, 100]
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


def height_of_rows(rows: int) -> float:
    """Returns the inches of an axis with a named row for each scheme."""
    return 0.35 + 0.16 * rows


def marks(names: dict[str, tuple[str, str]], **style: Any) -> list[Any]:
    """Returns handles of a legend: a marker in its color for each name.

    Args:
        names: Color and marker of each name.
        style: Further properties of the markers.
    """
    return [
        plt.Line2D([], [], color=color, marker=marker, linestyle="", label=name, **style)
        for name, (color, marker) in names.items()
    ]
