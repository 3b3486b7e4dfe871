"""The allocation of bits against all possible ones of small problems."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.calibration.bit_allocation import allocate, hull_steps

SEEDS = st.integers(0, 10**6)


def problem(
    parts: int, widths: int, seed: int, *, coarse: bool = False, forbidden: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Whole costs that increase, and errors in any order, some of them infinite.

    Coarse errors are multiples of 0.1, so that steps of equal gain are common and differ by
    rounding alone.
    """
    random = np.random.default_rng(seed)
    costs = random.integers(1, 6, (parts, widths)).cumsum(1).astype(np.float64)
    errors: np.ndarray = random.random((parts, widths))
    if coarse:
        costs = np.tile(np.arange(1.0, widths + 1), (parts, 1)) * random.integers(1, 4, (parts, 1))
        errors = random.integers(0, 8, (parts, widths)) * 0.1
    if random.random() < 0.5:
        errors = -np.sort(-errors, axis=1)
    bad = random.random((parts, widths)) < forbidden
    bad[np.arange(parts), random.integers(0, widths, parts)] = False
    return costs, np.where(bad, math.inf, errors)


def totals(costs: np.ndarray, errors: np.ndarray, chosen: np.ndarray) -> tuple[float, float]:
    parts = np.arange(len(costs))
    return float(costs[parts, chosen].sum()), float(errors[parts, chosen].sum())


def smallest_error(costs: np.ndarray, errors: np.ndarray, budget: float) -> float:
    """The smallest error of all allocations within the budget."""
    parts, widths = costs.shape
    every = (np.array(x) for x in itertools.product(range(widths), repeat=parts))
    found = [totals(costs, errors, chosen) for chosen in every]
    return min(error for cost, error in found if cost <= budget)


def smallest_cost(costs: np.ndarray, errors: np.ndarray) -> float:
    return float(np.where(np.isfinite(errors), costs, math.inf).min(1).sum())


@settings(max_examples=150, deadline=None)
@given(
    parts=st.integers(1, 4),
    widths=st.integers(1, 5),
    seed=SEEDS,
    coarse=st.booleans(),
    price=st.floats(1e-4, 2.0),
)
def test_it_is_optimal_where_a_step_ends(
    parts: int, widths: int, seed: int, coarse: bool, price: float
) -> None:
    """There, each part has the width of the smallest error plus price times cost."""
    costs, errors = problem(parts, widths, seed, coarse=coarse)
    budget = float(costs[np.arange(parts), (errors + price * costs).argmin(1)].sum())
    cost, error = totals(costs, errors, allocate(costs, errors, budget))
    assert cost <= budget
    assert error <= smallest_error(costs, errors, budget) + 1e-12


@settings(max_examples=200, deadline=None)
@given(
    parts=st.integers(1, 6),
    widths=st.integers(1, 6),
    seed=SEEDS,
    coarse=st.booleans(),
    share=st.floats(0.0, 1.2),
)
def test_any_budget_is_kept_and_used(
    parts: int, widths: int, seed: int, coarse: bool, share: float
) -> None:
    costs, errors = problem(parts, widths, seed, coarse=coarse)
    least = smallest_cost(costs, errors)
    budget = least + share * (float(costs.max(1).sum()) - least)
    chosen = allocate(costs, errors, budget)
    assert chosen.dtype == np.int64 and chosen.shape == (parts,)
    cost, error = totals(costs, errors, chosen)
    assert cost <= budget
    assert math.isfinite(error)  # no width that is not allowed
    assert error <= totals(costs, errors, np.isfinite(errors).argmax(1))[1]
    # no part could take another width for what is left and err less
    for part, width in itertools.product(range(parts), range(widths)):
        other = chosen.copy()
        other[part] = width
        if totals(costs, errors, other)[0] <= budget:
            assert totals(costs, errors, other)[1] >= error - 1e-12


@settings(max_examples=200, deadline=None)
@given(
    parts=st.integers(1, 6),
    widths=st.integers(1, 6),
    seed=SEEDS,
    coarse=st.booleans(),
    share=st.floats(0.0, 1.2),
)
def test_no_uniform_width_is_better_for_convex_errors(
    parts: int, widths: int, seed: int, coarse: bool, share: float
) -> None:
    """For parts of one size; a large part's step may leave a budget unused that is full of it."""
    random = np.random.default_rng(seed)
    costs = np.tile(16.0 * np.arange(1, widths + 1), (parts, 1))
    saved: np.ndarray = random.random((parts, widths))
    if coarse:
        saved = random.integers(0, 3, (parts, widths)) * 0.1
    errors = 10.0 - np.sort(saved, axis=1)[:, ::-1].cumsum(1)
    least = float(costs[:, 0].sum())
    budget = least + share * (float(costs[:, -1].sum()) - least)
    _, error = totals(costs, errors, allocate(costs, errors, budget))
    for width in range(widths):
        uniform = totals(costs, errors, np.full(parts, width))
        if uniform[0] <= budget:
            assert error <= uniform[1] + 1e-12
    assert error <= smallest_uniform_mix(errors, int((budget - least) // 16)) + 1e-12


def smallest_uniform_mix(errors: np.ndarray, steps: int) -> float:
    """The error after the given number of single steps, each the one that saves most."""
    saved = np.sort((errors[:, :-1] - errors[:, 1:]).reshape(-1))[::-1]
    return float(errors[:, 0].sum() - saved[:steps].sum())


@settings(max_examples=100, deadline=None)
@given(widths=st.integers(1, 7), seed=SEEDS, coarse=st.booleans())
def test_steps_go_along_the_lower_hull(widths: int, seed: int, coarse: bool) -> None:
    costs, errors = (x[0] for x in problem(1, widths, seed, coarse=coarse))
    start, steps = hull_steps(7, costs, errors)
    assert start == int(np.isfinite(errors).argmax())
    at, before = start, math.inf
    for step in steps:
        assert step.part == 7 and step.width > at and math.isfinite(errors[step.width])
        assert step.cost == costs[step.width] - costs[at]
        assert step.saved == errors[at] - errors[step.width] > 0
        assert step.gain <= before and step.gain == pytest.approx(step.saved / step.cost)
        at, before = step.width, step.gain
        # no allowed point lies below the line of the step
        line = errors[at] + before * (costs[at] - costs)
        assert np.all(errors[start:] >= line[start:] - 1e-12)
    assert errors[at] == errors[start:].min()


def test_rounding_does_not_change_the_order_of_a_part_s_steps() -> None:
    """Points on a line but for rounding, by which a later step seems to gain more."""
    costs = np.array([[4.0, 8.0, 13.0, 18.0, 19.0]])
    slope = [6.10421700958959, 4.476425807032367, 2.441686803835837, 0.4069478006393061, 0.0]
    errors = np.array([slope])
    _, steps = hull_steps(0, costs[0], errors[0])
    assert any(b.saved / b.cost > a.saved / a.cost for a, b in itertools.pairwise(steps))
    assert [step.gain for step in steps] == sorted((step.gain for step in steps), reverse=True)
    for width, budget in enumerate([7.5, 12.5, 17.5, 18.5, 19.0]):
        assert allocate(costs, errors, budget).tolist() == [width]


@pytest.mark.parametrize("short", [0.4, 1.0, 100.0])
def test_too_small_a_budget_is_refused(short: float) -> None:
    costs, errors = problem(5, 6, 0)
    least = smallest_cost(costs, errors)
    chosen = allocate(costs, errors, least)
    assert totals(costs, errors, chosen)[0] == least
    with pytest.raises(ValueError, match="bits per token less than the smallest widths take"):
        allocate(costs, errors, least - short)


def test_a_part_without_a_width_is_refused() -> None:
    costs, errors = problem(3, 4, 1)
    errors[1] = math.inf
    with pytest.raises(ValueError, match="no width is allowed"):
        allocate(costs, errors, 1e9)
    errors[1] = math.nan
    with pytest.raises(ValueError, match="no width is allowed"):
        allocate(costs, errors, 1e9)
    with pytest.raises(ValueError, match="no width is allowed"):
        hull_steps(0, costs[1], errors[1])


def test_what_steps_leave_goes_to_what_still_fits() -> None:
    """The first part's step, to the end of its hull, does not fit, but half of it does."""
    costs = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    errors = np.array([[10.0, 9.0, 0.0], [10.0, 9.5, 9.25]])
    assert [step.width for step in hull_steps(0, costs[0], errors[0])[1]] == [2]
    assert allocate(costs, errors, 2.9).tolist() == [0, 0]
    assert allocate(costs, errors, 3.0).tolist() == [1, 0]
    assert allocate(costs, errors, 4.0).tolist() == [2, 0]
    assert allocate(costs, errors, 5.0).tolist() == [2, 1]


def test_bits_go_where_they_save_most() -> None:
    costs = np.tile(np.arange(1.0, 7), (3, 1))
    variance = np.array([64.0, 4.0, 0.25])
    errors = variance[:, None] * 4.0 ** -np.arange(1, 7)
    # reverse water-filling: two bits more for 16 times the variance
    assert allocate(costs, errors, 9.0).tolist() == [4, 2, 0]
    assert allocate(costs, errors, 3.0).tolist() == [0, 0, 0]
    assert allocate(costs, errors, 18.0).tolist() == [5, 5, 5]
    assert allocate(costs, errors, 1e9).tolist() == [5, 5, 5]
