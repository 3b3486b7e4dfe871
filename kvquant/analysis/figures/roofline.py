"""The figure `roofline`: decode attention against the device's roofline.

Both coordinates follow from a record: operations from shape, batch and tokens, bytes and times as
measured. The roof of bandwidth is the rate of the copy that took turns with the kernel. The roof of
arithmetic is the rate at which the GPU can issue instructions, by which the record states the slots
per element; records of a device without it have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvquant.analysis.figures.style import (
    BACKENDS,
    BASELINE,
    FRONTIER,
    GREY,
    SMALL,
    WIDTH,
    NothingMeasuredError,
    fill_marks,
    filled,
    legend,
    looks,
    marks,
    plt,
)
from kvquant.analysis.labels import case_label, labels_of
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study
from kvquant.study.kernels import SHAPES

KEYS = ["shape", "batch", "tokens"]
OPERATIONS = 2  # of a multiplication and its addition
HEIGHT = 2.6  # inches of the panel


def operations(shape: str, batch: int, tokens: int) -> int:
    """Returns multiplications and additions of one layer's decode attention.

    Each query head multiplies each key and each value of its key-value head once.
    """
    return 2 * OPERATIONS * batch * tokens * SHAPES[shape]["hidden_size"]


def points(kernels: pd.DataFrame) -> pd.DataFrame:
    """Returns operations per byte and per second of every timed side of attention.

    Columns besides those of the table: `intensity` in operations per byte, `rate` with `rate_low`
    and `rate_high` in operations per second, and `issue`, the most operations per second without
    tensor cores, where the record holds it.
    """
    rows = kernels[(kernels.measure == "attention") & kernels.role.isin(["ours", "fp16"])]
    rows = rows[rows.ms_median.notna() & rows.nbytes.notna()].copy()
    work = [operations(str(r.shape), int(r.batch), int(r.tokens)) for r in rows[KEYS].itertuples()]
    rows["intensity"] = np.array(work) / rows.nbytes.astype(float)
    for name, times in (("rate", "median"), ("rate_low", "p90"), ("rate_high", "p10")):
        rows[name] = np.array(work) / (rows[f"ms_{times}"].astype(float) / 1e3)
    # a slot is an instruction per element and query head of its group: half of the operations of
    # an element that is multiplied and added
    rows["issue"] = rows.slots_per_element.astype(float) * rows.rate
    return rows


def fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the fastest backend of each shape, batch and length."""
    return rows.loc[rows.groupby(KEYS, sort=False).rate.idxmax()]


def _roofs(axis: Any, rows: pd.DataFrame, copies: pd.Series) -> None:
    """Draws the rate of copies as a slope with its band, and that of instructions as a level."""
    first, last = float(rows.intensity.min()) / 1.6, float(rows.intensity.max()) * 1.6
    level = float(rows.issue.max())
    rate = float(copies.median()) * 1e9
    if level == level:
        last = max(last, 1.5 * level / rate)
    at = np.geomspace(first, last, 200)

    def roof(rate: float) -> np.ndarray:
        return np.fmin(at * rate, level) if level == level else at * rate

    style = {"color": FRONTIER, "zorder": 1}
    axis.fill_between(
        at, roof(copies.min() * 1e9), roof(copies.max() * 1e9), alpha=0.25, lw=0, **style
    )
    axis.plot(at, roof(rate), lw=1.0, **style)
    note = {"fontsize": SMALL, "color": GREY, "textcoords": "offset points"}
    third = at[len(at) // 3]
    axis.annotate("a device copy", (third, third * rate), (-6, 4), ha="right", **note)
    if level == level:
        axis.annotate("without tensor cores", (at[-1], level), (0, 3), ha="right", **note)


def draw(study: Study, tables: Path) -> Any:
    """Draws each kernel of decode attention in the plane of operations per byte and per second."""
    kernels = one_device(study, read_table(tables, "kernels"))
    rows = points(kernels)
    if not len(rows):
        raise NothingMeasuredError("figure roofline: no decode attention was timed")
    rows = pd.concat([rows[rows.role == "ours"], fastest(rows[rows.role == "fp16"])])
    rows = rows.drop_duplicates([*KEYS, "side"])
    cases = list(dict.fromkeys(rows[KEYS].itertuples(index=False, name=None)))
    marked, names = looks(study), labels_of(study)
    figure, axis = plt.subplots(figsize=(WIDTH, HEIGHT))
    there = kernels[(kernels.measure == "attention") & kernels.copy_gb_per_s.notna()]
    _roofs(axis, rows, there.copy_gb_per_s.astype(float))
    for row in rows.to_dict("records"):
        ours = row["role"] == "ours"
        color, marker = marked[row["scheme"]] if ours else (BASELINE, BACKENDS[row["side"]][1])
        ends = [
            [max(0.0, row["rate"] - row["rate_low"])], [max(0.0, row["rate_high"] - row["rate"])]
        ]  # fmt: skip
        place = cases.index(tuple(row[key] for key in KEYS))
        style = {"ms": 4.5, "elinewidth": 0.8, "capsize": 1.5, "zorder": 4 if ours else 3}
        axis.errorbar(
            row["intensity"], row["rate"], yerr=ends, fmt=marker, color=color,
            **style, **filled(color, place),
        )  # fmt: skip
    axis.set(xscale="log", yscale="log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e12:g}"))
    axis.set_xlabel("operations per byte")
    axis.set_ylabel("$10^{12}$ operations per second")
    found = {names.scheme(s): marked[s] for s in dict.fromkeys(rows[rows.role == "ours"].scheme)}
    found |= {
        f"fp16, {BACKENDS[s][0]}": (BASELINE, BACKENDS[s][1])
        for s in dict.fromkeys(rows[rows.role == "fp16"].side)
    }
    lines = legend(figure, marks(found, ms=4.5), WIDTH)
    shapes = [case_label(str(s), int(b), int(t), int(b) * int(t)) for s, b, t in cases]
    lines += legend(figure, fill_marks(shapes), WIDTH, "lower center")
    figure.set_size_inches(WIDTH, HEIGHT + 0.15 * lines)
    return figure
