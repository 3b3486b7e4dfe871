"""Cells: numbers are finite, and what is none says why."""

from __future__ import annotations

import json
import math

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from kvquant.analysis.explorer.values import Column, is_missing, missing, number, spread

ANY = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.none(), st.just(pd.NA))


@given(ANY)
def test_a_number_is_finite_or_missing(value: float | None) -> None:
    cell = number(value, "why")
    json.dumps(cell, allow_nan=False)
    if value is None or value is pd.NA or not math.isfinite(value):
        assert cell == {"no": "why"} and is_missing(cell)
    else:
        assert not is_missing(cell)
        assert math.isclose(float(str(cell)), value, rel_tol=1e-9)


@given(st.floats(-1e9, 1e9), ANY, ANY, st.sampled_from(["", "worse"]))
def test_an_interval_has_both_ends_or_none(
    value: float, low: float | None, high: float | None, note: str
) -> None:
    cell = spread(value, low, high, note=note)
    json.dumps(cell, allow_nan=False)
    assert not is_missing(cell)
    if isinstance(cell, dict):
        assert ("lo" in cell) == ("hi" in cell) and cell.get("t", "") == note


def test_a_missing_number_has_no_interval() -> None:
    assert spread(float("nan"), 1, 2, "out of memory") == missing("out of memory")


def test_a_column_says_what_differs_from_the_default() -> None:
    assert Column("a", "A", digits=0).to_json() == {"name": "a", "head": "A", "digits": 0}
    assert Column("a", "A", text=True).to_json() == {"name": "a", "head": "A", "text": True}
