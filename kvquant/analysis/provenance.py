"""Which records a number, a table or a figure comes from.

Rows of collected tables name their record by the beginning of its seal, a hash over all that it
holds. So the hash of what was made from some rows changes with those records and with no others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pandas as pd

LETTERS = 12  # of a seal: two of ten thousand records share them with a probability of 2e-7
RECORD = "record"  # the column


def short(seal: str) -> str:
    """Returns the name of a record in collected tables."""
    return seal[:LETTERS]


def records_of(*tables: pd.DataFrame) -> frozenset[str]:
    """Returns the records that rows come from."""
    return frozenset(name for t in tables if RECORD in t for name in t[RECORD].dropna())


def digest(records: Iterable[str]) -> str:
    """Returns one hash of several records, whatever their order; empty for none."""
    names = sorted(set(records))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:LETTERS] if names else ""


def told(records: Iterable[str]) -> str:
    """Returns how many records something comes from, with their hash."""
    names = set(records)
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} record{plural} {digest(names)}".rstrip()
