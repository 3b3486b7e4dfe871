"""The figure `kernels`: share of the copy rate, and time of fp16 and of peers over ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvquant.analysis.figures.style import WIDTH, height_of_rows, marks, plt
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.errors import UserError
from kvquant.study.config import Study

WORDS = {
    "pack": "quantize and pack",
    "attention": "decode attention",
    "steps": "decode step, model",
    "layer-step": "decode step, layer",
    "prefill": "prefill",
    "continue": "continued prefill",
}
OURS = ("#000000", "o")
FP16 = {  # backends of torch's attention; whole models choose one of them
    "cudnn": ("#0072B2", "s"),
    "flash": ("#56B4E9", "^"),
    "efficient": ("#009E73", "v"),
}
WHOLE = ("#CC79A7", "D")
PEERS = (("#D55E00", "D"), ("#E69F00", "P"), ("#0072B2", "X"), ("#009E73", "*"))  # by measurement
# Text in place of a missing ratio, by status; with 'ok' our own time is missing.
MISSING = {"ok": "no time of ours", "oom": "out of memory", "refused": "cannot run"}
Looks = dict[str, tuple[str, str]]


def _labelled(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Returns (label, sides) of every measurement, all cases of a kind together.

    Cases that measure the same on the same shape, for the sake of other peers, are one row, named
    after the first.
    """
    order = list(WORDS)
    same = ["measure", "shape", "batch", "tokens", "all_tokens"]
    groups = [(str(key[0]), sides) for key, sides in rows.groupby(same, sort=False)]
    groups.sort(key=lambda g: order.index(g[0]))  # stable: cases as the study has them
    return [(f"{WORDS[measure]}, {sides.case.iloc[0]}", sides) for measure, sides in groups]


def _of_first_case(groups: list[tuple[str, pd.DataFrame]]) -> list[tuple[str, pd.DataFrame]]:
    return [(label, sides[sides.case == sides.case.iloc[0]]) for label, sides in groups]


def rates(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Returns the measurements whose bytes are known, without the copies."""
    return _of_first_case(_labelled(rows[(rows.role != "copy") & rows.copy_share.notna()]))


def ratios(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Returns the measurements that compare ours with fp16."""
    return _of_first_case(_labelled(rows[(rows.role == "fp16") & rows.over_ours_median.notna()]))


def look(side: str, role: str) -> tuple[str, str]:
    """Returns color and marker of ours or of a 16-bit side."""
    return OURS if role == "ours" else FP16.get(side, WHOLE)


def legend(rows: pd.DataFrame, ours: str) -> Looks:
    """Returns color and marker of each name in the first two panels."""
    there = set(rows[rows.status == "ok"].side)
    whole = [s for s in dict.fromkeys(rows[rows.role == "fp16"].side) if s not in FP16]
    found = {ours: OURS} | {f"fp16, {s}": look for s, look in FP16.items() if s in there}
    return found | {s if s == "fp16" else f"fp16, {s}": WHOLE for s in whole}


def _point(
    axis: Any, x: float, place: float, ends: list[float], looks: tuple[str, str], size: float = 4
) -> None:
    """Draws a median with its whiskers."""
    error = [[max(0.0, x - min(ends))], [max(0.0, max(ends) - x)]]
    style = {"color": looks[0], "elinewidth": 0.8, "capsize": size / 2, "ms": size}
    axis.errorbar(x, place, xerr=error, fmt=looks[1], **style)


def _names(axis: Any, labels: list[str]) -> None:
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def rate_panel(axis: Any, found: list[tuple[str, pd.DataFrame]]) -> None:
    """Draws the share of the rate of a device copy, a row per measurement."""
    for place, (_, sides) in enumerate(found):
        for side in sides.itertuples():
            # a rate is bytes over time: the slowest rounds give the lower end
            ends = [100 * side.floor_ms / t for t in (side.ms_p90, side.ms_p10)]
            _point(axis, 100 * side.copy_share, place, ends, look(side.side, side.role))
    axis.axvline(100, color="#888888", linewidth=0.8, zorder=1)
    axis.set_xlim(0, max(110.0, axis.get_xlim()[1]))
    _names(axis, [label for label, _ in found])
    axis.set_xlabel("bytes a second, % of a device copy (more is better)", loc="right")


def _ratio_scale(axis: Any) -> None:
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.5), max(high, 2.5))
    axis.axvline(1, color="#888888", linewidth=0.8, zorder=1)
    wide = axis.get_xlim()[1] / axis.get_xlim()[0] > 100
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def ratio_panel(axis: Any, found: list[tuple[str, pd.DataFrame]]) -> None:
    """Draws time of fp16 over ours on a logarithmic scale, a row per measurement."""
    for place, (_, sides) in enumerate(found):
        for side in sides.itertuples():
            ends = [side.over_ours_p10, side.over_ours_p90]
            _point(axis, side.over_ours_median, place, ends, look(side.side, side.role))
    _ratio_scale(axis)
    _names(axis, [label for label, _ in found])
    axis.set_xlabel("time of fp16 over ours (right of 1: ours is faster)", loc="right")


def peers_panel(axis: Any, peers: pd.DataFrame) -> Looks:
    """Draws time of peers over ours, a row per peer, and returns the marker per measurement."""
    names = list(dict.fromkeys(peers.side))
    groups = _labelled(peers)
    looks = {label: PEERS[i % len(PEERS)] for i, (label, _) in enumerate(groups)}
    for i, (label, sides) in enumerate(groups):
        shift = (i - (len(groups) - 1) / 2) * min(0.4, 0.8 / len(groups))
        for side in sides[sides.over_ours_median.notna()].itertuples():
            ends = [side.over_ours_p10, side.over_ours_p90]
            place = names.index(side.side) + shift
            _point(axis, side.over_ours_median, place, ends, looks[label], size=3)
    for place, name in enumerate(names):
        without = peers[(peers.side == name) & peers.over_ours_median.isna()]
        text = ", ".join(dict.fromkeys(MISSING.get(s, s) for s in without.status))
        style = {"fontsize": 6, "va": "center", "color": "#666666"}
        axis.annotate(text, (1, place), (3, 0), textcoords="offset points", **style)
    _ratio_scale(axis)
    _names(axis, names)
    axis.set_xlabel("time of peers over ours (right of 1: ours is faster)", loc="right")
    return looks


def draw(study: Study, tables: Path) -> Any:
    """Draws kernels against the rate of a copy, against fp16, and against peers."""
    rows = one_device(study, read_table(tables, "kernels"))
    above, middle, peers = rates(rows), ratios(rows), rows[rows.role == "peer"]
    counts = [n for n in (len(above), len(middle), peers.side.nunique()) if n]
    if not counts:
        raise UserError("figure kernels: no kernel and no comparison has a time")
    heights = [height_of_rows(n) for n in counts]
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
    figure.legend(
        handles=marks(looks, ms=4),
        loc=f"outside {where} center",
        ncols=3 if where == "upper" else 1,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.0,
    )
