"""Paired tests against scipy, and the degenerate cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvquant.analysis.pareto import dominated
from kvquant.analysis.statistics import bootstrap_interval, holm, paired_test, verdict


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30), shift=st.floats(-2, 2), seed=st.integers(0, 10**6))
def test_equals_scipy(n: int, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, ours = rng.normal(size=n), rng.normal(size=n) + shift
    test = paired_test(ours - base, 0.5, 0.05)
    expected = stats.ttest_rel(ours, base)
    interval = expected.confidence_interval(0.95)
    assert test.p == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-12)
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high))
    lower = stats.ttest_1samp(ours - base, -0.5, alternative="greater").pvalue
    upper = stats.ttest_1samp(ours - base, 0.5, alternative="less").pvalue
    assert test.p_equivalence == pytest.approx(max(lower, upper), rel=1e-9, abs=1e-12)


def test_holm_on_a_worked_example() -> None:
    adjusted = holm(np.array([0.01, 0.04, 0.03, 0.005, np.nan]))
    assert adjusted[:4] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert np.isnan(adjusted[4])


def test_degenerate_cases() -> None:
    same = paired_test(np.zeros(5), 0.1, 0.05)
    assert (same.p, same.p_equivalence, same.effect) == (1.0, 0.0, 0.0)
    assert verdict(same, 1.0, 0.05, True) == "identical"
    constant = paired_test(np.full(5, 0.3), 0.1, 0.05)
    assert (constant.p, constant.low, constant.high) == pytest.approx((0.0, 0.3, 0.3))
    assert constant.p_equivalence == 1.0
    assert verdict(constant, 0.0, 0.05, True) == "better"
    assert verdict(constant, 0.0, 0.05, False) == "worse"
    single = paired_test(np.array([0.3]), 0.1, 0.05)
    assert np.isnan(single.p)
    assert verdict(single, float("nan"), 0.05, True) == "inconclusive"
    with pytest.raises(ValueError, match="empty"):
        paired_test(np.array([]), 0.1, 0.05)
    with pytest.raises(ValueError, match="margin"):
        paired_test(np.zeros(3), 0.0, 0.05)


def test_bootstrap_is_deterministic_and_covers_the_mean() -> None:
    x = np.random.default_rng(0).normal(1.0, 0.1, 200)
    first = bootstrap_interval(x, 500, 0.05, 7)
    assert first == bootstrap_interval(x, 500, 0.05, 7)
    assert first[0] < x.mean() < first[1]


def test_dominance_with_missing_values() -> None:
    nan = np.nan
    costs = np.array([[1.0, 1.0], [2.0, 1.0], [0.5, 3.0], [nan, 2.0], [nan, nan]])
    assert dominated(costs).tolist() == [False, True, False, True, False]
