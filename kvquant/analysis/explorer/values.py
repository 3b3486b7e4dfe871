"""Cells, columns and rows of the explorer's tables, in the form in which the page reads them.

A cell is a text, a number, a number with its interval, or the reason why there is none. No cell is
empty, so that what is zero, what is missing and what was never asked for look different.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = float | int | str | dict[str, Any]

NOT_MEASURED = "not measured"  # the study asks for it, and there is no record
NOT_ASKED = "not asked"  # the study does not ask for it
NO_MEMORY = "out of memory"
NOT_APPLICABLE = "n/a"  # such a row has no such number
STATUSES = {"oom": NO_MEMORY, "refused": "cannot run"}
DIGITS = 10  # significant, as in the collected tables' CSV twins


def missing(why: str) -> Cell:
    """Returns the cell of what there is no number of.

    Args:
        why: The reason, as readers see it.
    """
    return {"no": why}


def _plain(value: Any) -> float | int | None:
    """Returns a finite number, with integers as such; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):  # None and pandas' missing values
        return None
    if not math.isfinite(number):
        return None
    rounded = float(f"{number:.{DIGITS}g}")
    if not math.isfinite(rounded):  # rounded up beyond the largest number
        return number
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def number(value: Any, why: str = NOT_MEASURED) -> Cell:
    """Returns the cell of a number.

    Args:
        value: The number; None, NaN and infinities are missing.
        why: The reason if it is missing.
    """
    plain = _plain(value)
    return missing(why) if plain is None else plain


def spread(value: Any, low: Any, high: Any, why: str = NOT_MEASURED, note: str = "") -> Cell:
    """Returns the cell of a number with its interval and, behind it, a note such as its verdict.

    Args:
        value: The number.
        low: The lower end; with a missing end there is no interval.
        high: The upper end.
        why: The reason if the number is missing.
        note: A word or two.
    """
    plain, ends = _plain(value), (_plain(low), _plain(high))
    if plain is None:
        return missing(why)
    cell: dict[str, Any] = {"v": plain}
    if None not in ends:
        cell |= {"lo": ends[0], "hi": ends[1]}
    return (cell | {"t": note}) if note else (cell if len(cell) > 1 else plain)


def is_missing(cell: Cell) -> bool:
    """Returns whether a cell says why there is no number."""
    return isinstance(cell, dict) and "no" in cell


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its name in a link to a sorted view.
        head: Its head.
        help: What it is, in plain text.
        digits: Decimals of its numbers; None for four significant digits.
        signed: Whether positive numbers have a sign.
        text: Whether it holds texts, which stand to the left.
        suite: The suite that it is of; empty for any.
    """

    name: str
    head: str
    help: str = ""
    digits: int | None = None
    signed: bool = False
    text: bool = False
    suite: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the column without what has its default."""
        return {k: v for k, v in vars(self).items() if v is not None and v is not False and v != ""}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        cells: A cell per column, by the column's name.
        scheme: Key of the scheme that it is of; None for none.
        model: Key of its model; None for none, such as a shape with random weights.
        suite: Its suite; empty for none.
        bits: The cell of its bits per element, by which the page filters.
        cell: The measurement that it shows, as (stage, names of the record without seed or
            repetition); None for what follows from several, such as a mean.
    """

    cells: Mapping[str, Cell]
    scheme: str | None = None
    model: str | None = None
    suite: str = ""
    bits: Cell | None = None
    cell: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Sheet:
    """A table of the explorer: columns, and rows in the order of the study."""

    columns: Sequence[Column]
    rows: Sequence[Row]

    def to_json(self, schemes: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
        """Returns the table as the page reads it.

        Args:
            schemes: Keys of schemes, by whose positions rows name theirs.
            models: Keys of models, likewise.

        Raises:
            ValueError: A row lacks a cell of a column.
        """
        rows = []
        for row in self.rows:
            lacking = [c.name for c in self.columns if c.name not in row.cells]
            if lacking:
                raise ValueError(f"explorer: a row has no cell '{lacking[0]}'")
            plain: dict[str, Any] = {"c": [row.cells[c.name] for c in self.columns]}
            if row.scheme in schemes:
                plain["s"] = schemes.index(row.scheme)
            if row.model in models:
                plain["m"] = models.index(row.model)
            if row.suite:
                plain["g"] = row.suite
            if row.bits is not None and not is_missing(row.bits):
                plain["b"] = row.bits["v"] if isinstance(row.bits, dict) else row.bits
            rows.append(plain)
        return {"columns": [c.to_json() for c in self.columns], "rows": rows}
