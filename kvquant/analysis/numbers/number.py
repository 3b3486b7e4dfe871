"""One number of the paper's text: its key, its value in LaTeX, and its records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd

from kvquant.analysis.booktabs import escape, number
from kvquant.analysis.provenance import records_of


@dataclass(frozen=True)
class Number:
    """A number, or another fact, that the text shows by its key.

    Attributes:
        key: Its name in the text, such as "allocated-3.loss".
        value: Its value in LaTeX.
        records: Beginnings of the seals of the records that it comes from; empty for facts of the
            study file.
    """

    key: str
    value: str
    records: frozenset[str] = frozenset()

    def within(self, prefix: str) -> Number:
        """Returns the number with a prefix before its key."""
        return replace(self, key=f"{prefix}.{self.key}") if prefix else self


def fact(key: str, value: object, *rows: pd.DataFrame) -> Number:
    """Returns a text with the records of the rows that it comes from."""
    return Number(key, escape(value), records_of(*rows))


def measured(key: str, value: float | None, digits: int, *rows: pd.DataFrame) -> Iterator[Number]:
    """Yields a number with the records of its rows, and nothing for one that was not measured.

    Text that asks for a number that is not there shows a mark in its place.
    """
    if value is not None and not pd.isna(value):
        yield Number(key, str(escape(number(float(value), digits))), records_of(*rows))


def spread(
    key: str, values: tuple[float, float, float], digits: int, *rows: pd.DataFrame
) -> Iterator[Number]:
    """Yields a value with the ends of its interval as further numbers, KEY-low and KEY-high."""
    for suffix, value in zip(("", "-low", "-high"), values, strict=True):
        yield from measured(f"{key}{suffix}", value, digits, *rows)
