"""Percentiles: those of numpy, also from the largest values alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.study.percentiles import largest_needed, percentile

VALUES = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=300)


@given(VALUES, st.integers(0, 1000))
def test_it_is_numpys(values: list[float], per_mille: int) -> None:
    expected = np.percentile(values, per_mille / 10)
    assert percentile(values, per_mille) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(VALUES, st.integers(0, 1000), st.integers(0, 5))
def test_the_largest_values_are_enough(values: list[float], per_mille: int, more: int) -> None:
    needed = largest_needed(len(values), per_mille)
    largest = sorted(values)[-(needed + more) :]
    assert percentile(largest, per_mille, len(values)) == percentile(values, per_mille)
    with pytest.raises(ValueError, match="too few"):
        percentile(largest[len(largest) - needed + 1 :], per_mille, len(values))


@pytest.mark.parametrize(
    ("count", "needed"), [(1, 1), (2, 2), (100, 2), (101, 2), (102, 3), (1001, 11), (10**6, 10001)]
)
def test_the_99th_percentile_needs_one_value_in_a_hundred(count: int, needed: int) -> None:
    assert largest_needed(count, 990) == needed


def test_levels_and_places_by_hand() -> None:
    values = [float(n) for n in range(1001)]
    assert percentile(values[::-1], 999) == 999.0 and percentile(values, 990) == 990.0
    assert percentile([1.0, 5.0], 750) == 4.0
    assert percentile([3.0], 999) == 3.0
    with pytest.raises(ValueError, match=r"0 values are too few for the percentile 99\.9 of 0"):
        percentile([], 999)
