"""The figure `kernels`: share of the copy rate, and time of fp16 and of peers over ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvquant.analysis.figures.style import (
    BACKENDS,
    BASELINE,
    GREY,
    PAGE_WIDTH,
    SMALL,
    WIDTH,
    Look,
    fill_marks,
    filled,
    height_of_rows,
    legend,
    looks,
    marks,
    most_lines,
    name_rows,
    plt,
)
from kvquant.analysis.labels import Labels, case_label, labels_of
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
    "prompt-attention": "8-bit attention of a prompt",
}
WHOLE = "D"  # of steps and prefills with transformers' growing cache
# Text in place of a missing ratio, by status; with 'ok' our own time is missing.
MISSING = {"ok": "no time of ours", "oom": "out of memory", "refused": "cannot run"}
LETTERS, PEER_LETTERS = 34, 22  # of a line of the name of a measurement, and of a peer


@dataclass(frozen=True)
class Names:
    """How a figure shows the sides of a measurement.

    Attributes:
        headline: The scheme whose kernels are measured where a row does not say otherwise.
        looks: Color and marker of every scheme of the study.
        labels: Names of the study's schemes.
    """

    headline: str
    looks: Mapping[str, Look]
    labels: Labels


def _named(measure: str, sides: pd.DataFrame, names: Names) -> str:
    """Returns the name of a measurement: what is measured, on what shape, and by which scheme."""
    scheme, shape, *sizes = sides.iloc[0][["scheme", "shape", "batch", "tokens", "all_tokens"]]
    by = "" if scheme == names.headline else f", {names.labels.scheme(str(scheme))}"
    return f"{WORDS[measure]}, {case_label(str(shape), *map(int, sizes))}{by}"


def _labelled(rows: pd.DataFrame, names: Names) -> list[tuple[str, pd.DataFrame]]:
    """Returns (label, sides) of every measurement, all cases of a kind together.

    Cases that measure the same kernels on the same shape, for the sake of other peers, are one row.
    """
    order = list(WORDS)
    same = ["measure", "scheme", "shape", "batch", "tokens", "all_tokens"]
    groups = [(str(key[0]), sides) for key, sides in rows.groupby(same, sort=False)]
    groups.sort(key=lambda g: order.index(g[0]))  # stable: cases as the study has them
    return [(_named(measure, sides, names), sides) for measure, sides in groups]


def _of_first_case(groups: list[tuple[str, pd.DataFrame]]) -> list[tuple[str, pd.DataFrame]]:
    return [(label, sides[sides.case == sides.case.iloc[0]]) for label, sides in groups]


def rates(rows: pd.DataFrame, names: Names) -> list[tuple[str, pd.DataFrame]]:
    """Returns the measurements whose bytes are known, without the copies."""
    there = rows[(rows.role != "copy") & rows.copy_share.notna()]
    return _of_first_case(_labelled(there, names))


def ratios(rows: pd.DataFrame, names: Names) -> list[tuple[str, pd.DataFrame]]:
    """Returns the measurements that compare ours with fp16."""
    there = rows[(rows.role == "fp16") & rows.over_ours_median.notna()]
    return _of_first_case(_labelled(there, names))


def _style(side: Any, names: Names) -> tuple[Look, bool]:
    """Returns the look of ours or of a 16-bit side, and whether its marker is hollow."""
    if side.role == "ours":
        return names.looks[side.scheme], False
    _, marker = BACKENDS.get(side.side, ("", WHOLE))
    return (BASELINE, marker), True


def _legend_of(rows: pd.DataFrame, names: Names) -> list[Any]:
    """Returns the handles of the first two panels."""
    there = set(rows[rows.status == "ok"].side)
    whole = [s for s in dict.fromkeys(rows[rows.role == "fp16"].side) if s not in BACKENDS]
    found = {
        f"fp16 attention, {name}": (BASELINE, marker)
        for s, (name, marker) in BACKENDS.items()
        if s in there
    }
    found |= {f"{names.labels.scheme(s)}, growing": (BASELINE, WHOLE) for s in whole}
    drawn = rows[(rows.role == "ours") & rows.copy_share.notna()]  # the panel of rates alone
    ours = {names.labels.scheme(s): names.looks[s] for s in dict.fromkeys(drawn.scheme)}
    return marks(ours, ms=4.5) + marks(found, ms=4.5, mfc="white")


def _point(axis: Any, x: float, place: float, ends: list[float], look: Look, **style: Any) -> None:
    """Draws a median with its whiskers."""
    error = [[max(0.0, x - min(ends))], [max(0.0, max(ends) - x)]]
    shape = {"color": look[0], "elinewidth": 0.8, "capsize": 2, "ms": 4, **style}
    axis.errorbar(x, place, xerr=error, fmt=look[1], **shape)


def _side(axis: Any, x: float, place: int, ends: list[float], side: Any, names: Names) -> None:
    look, hollow = _style(side, names)
    _point(axis, x, place, ends, look, **({"mfc": "white"} if hollow else {}))


def rate_panel(
    axis: Any, found: list[tuple[str, pd.DataFrame]], rows: list[str], names: Names
) -> None:
    """Draws the share of the rate of a device copy, each measurement in the row of its name."""
    for label, sides in found:
        for side in sides.itertuples():
            # a rate is bytes over time: the slowest rounds give the lower end
            ends = [100 * side.floor_ms / t for t in (side.ms_p90, side.ms_p10)]
            _side(axis, 100 * side.copy_share, rows.index(label), ends, side, names)
    axis.axvline(100, color="#888888", linewidth=0.8, zorder=1)
    axis.set_xlim(0, max(110.0, axis.get_xlim()[1]))
    name_rows(axis, rows, LETTERS)
    axis.set_xlabel("bytes per second,\n% of a device copy\n(more is better)")


def _ratio_scale(axis: Any) -> None:
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.5), max(high, 2.5))
    axis.axvline(1, color="#888888", linewidth=0.8, zorder=1)
    wide = axis.get_xlim()[1] / axis.get_xlim()[0] > 100
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def ratio_panel(
    axis: Any, found: list[tuple[str, pd.DataFrame]], rows: list[str], names: Names
) -> None:
    """Draws time of fp16 over ours on a logarithmic scale, each in the row of its name."""
    for label, sides in found:
        for side in sides.itertuples():
            ends = [side.over_ours_p10, side.over_ours_p90]
            _side(axis, side.over_ours_median, rows.index(label), ends, side, names)
    _ratio_scale(axis)
    name_rows(axis, rows, LETTERS)
    axis.set_xlabel("time of fp16 over ours\n(right of 1: ours is faster)")


def peers_panel(axis: Any, peers: pd.DataFrame, names: Names) -> list[str]:
    """Draws time of peers over ours, a row per peer; the fill of its marker is the measurement.

    Returns:
        The names of the measurements, in the order of fills.
    """
    rows = list(dict.fromkeys(peers.side))
    groups = _labelled(peers, names)
    in_row = {row: [i for i, (_, s) in enumerate(groups) if row in set(s.side)] for row in rows}
    for i, (_, sides) in enumerate(groups):
        for side in sides[sides.over_ours_median.notna()].itertuples():
            ends = [side.over_ours_p10, side.over_ours_p90]
            look = names.looks.get(side.side.partition(" (")[0], (BASELINE, WHOLE))
            others = in_row[side.side]
            apart = min(0.36, 0.8 / len(others))
            place = rows.index(side.side) + (others.index(i) - (len(others) - 1) / 2) * apart
            _point(axis, side.over_ours_median, place, ends, look, **filled(look[0], i))
    for place, name in enumerate(rows):
        without = peers[(peers.side == name) & peers.over_ours_median.isna()]
        text = ", ".join(dict.fromkeys(MISSING.get(s, s) for s in without.status))
        style = {"fontsize": SMALL, "va": "center", "color": GREY}
        axis.annotate(text, (1, place), (3, 0), textcoords="offset points", **style)
    _ratio_scale(axis)
    name_rows(axis, [names.labels.scheme(row) for row in rows], PEER_LETTERS)
    axis.set_xlabel("time of peers over ours\n(right of 1: ours is faster)", loc="right")
    return [label for label, _ in groups]


def draw(study: Study, tables: Path) -> Any:
    """Draws kernels against the rate of a copy, against fp16, and against peers, side by side."""
    rows, marked = one_device(study, read_table(tables, "kernels")), looks(study)
    names = Names(study.headline, marked, labels_of(study))
    above, middle, peers = rates(rows, names), ratios(rows, names), rows[rows.role == "peer"]
    ours = list(dict.fromkeys(label for label, _ in _labelled(rows[rows.role != "peer"], names)))
    theirs = [names.labels.scheme(side) for side in dict.fromkeys(peers.side)]
    there = [label for label, _ in (*above, *middle)]
    ours = [label for label in ours if label in there]
    count = sum(map(bool, (above, middle, theirs)))
    if not count:
        raise UserError("figure kernels: no kernel and no comparison has a time")
    width = WIDTH if count == 1 else PAGE_WIDTH
    height = max(
        height_of_rows(len(ours), most_lines(ours, LETTERS)),
        height_of_rows(len(theirs), most_lines(theirs, PEER_LETTERS)),
    )
    figure, axes = plt.subplots(1, count, figsize=(width, height), squeeze=False)
    left = iter(axes[0])
    if above:
        rate_panel(next(left), above, ours, names)
    if middle:
        axis = next(left)
        ratio_panel(axis, middle, ours, names)
        if above:  # whose rows are the same
            axis.tick_params(labelleft=False)
    lines = legend(figure, _legend_of(rows, names), width)
    if len(peers):
        measured = peers_panel(next(left), peers, names)
        lines += legend(figure, fill_marks(measured), width, "lower center")
    figure.set_size_inches(width, height + max(0.6, 0.4 + 0.15 * lines))
    return figure
