"""The figure `append`: the cost of an appended token by cache size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from kvquant.analysis.figures.style import GREY, WIDTH, Look, legend, looks, placeholder, plt
from kvquant.analysis.labels import CONCATENATION, labels_of
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study

SERIES = "concatenation"  # KVQuant's procedure, which is no scheme of the study
CONCATENATED = (GREY, "x")  # its color and marker, which no scheme has


def _size(tokens: float, _: Any = None) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


def append_panels(
    axes: Sequence[Any], points: pd.DataFrame, marked: dict[str, Look], names: dict[str, str]
) -> None:
    """Draws cost per token against cache size, medians with bands of the 10th to 90th percentile.

    Args:
        axes: One per chunk size, in increasing order.
        points: The table `append`.
        marked: Color and marker of each scheme.
        names: Names of schemes in the legend.
    """
    marked = {**marked, SERIES: CONCATENATED}
    names = {**names, SERIES: CONCATENATION}
    sizes = sorted(points.tokens.unique())
    for axis, (chunk, mine) in zip(axes, points.groupby("chunk"), strict=True):
        for series, rows in mine.groupby("series", sort=False):
            color, marker = marked[str(series)]
            parts = ["token_ms_median", "token_ms_p10", "token_ms_p90"]
            lines = rows.groupby("tokens")[parts].median().astype(float).dropna() * 1e3
            lines = lines[(lines > 0).all(axis=1)]  # a logarithmic axis has no place for others
            if not len(lines):
                continue
            middle, low, high = (lines[p].to_numpy() for p in parts)
            where = lines.index.to_numpy(dtype=float)
            axis.fill_between(where, low, high, color=color, alpha=0.2, linewidth=0)
            name = names.get(str(series), str(series))
            axis.plot(where, middle, marker=marker, color=color, ms=3.5, lw=1.2, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(sizes[:: 1 + (len(sizes) - 1) // 8]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(_size))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        if not axis.lines:
            placeholder(axis, "not measured")
        low, high = axis.get_ylim()
        if high / low < 20:  # a flat curve must not look steep
            middle = np.sqrt(low * high)
            axis.set_ylim(middle / 5, middle * 5)
        calls = "1 token per call" if chunk == 1 else f"{chunk} tokens per call"
        axis.set_ylabel(f"µs per token,\n{calls}")
    axes[-1].set_xlabel("tokens in the cache")


def draw(study: Study, tables: Path) -> Any:
    """Draws the cost of an appended token, a panel per number of tokens in a call."""
    assert study.append is not None
    points = one_device(study, read_table(tables, "append"))
    chunks = study.append.chunks
    figure, axes = plt.subplots(
        len(chunks), 1, figsize=(WIDTH, 0.5 + 1.75 * len(chunks)), sharex=True, squeeze=False
    )
    append_panels(axes[:, 0], points, looks(study), dict(labels_of(study).schemes))
    figure.align_ylabels()
    handles = {h.get_label(): h for axis in axes[:, 0] for h in axis.lines}
    if handles:
        legend(figure, list(handles.values()), WIDTH)
    return figure
