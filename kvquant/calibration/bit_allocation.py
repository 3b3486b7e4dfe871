"""Distributes bits among parts of a cache so that the expected loss is the smallest.

A part, such as a tile of key channels, has an error and a cost for each width that its codes may
have. Errors of parts add up, and so do costs. On the lower convex hull of a part's (cost, error)
points the error saved per bit falls from width to width. Taking the steps of all hulls in the order
of that ratio gives, for each budget at which a step ends, the allocation of the smallest error
(reverse water-filling, for measured instead of Gaussian errors). What other budgets leave goes to
the single changes of a width that still fit, the one of the largest gain first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """A step along the convex hull of one part.

    Attributes:
        part: Index of the part.
        width: Index of the width that the step leads to.
        cost: Additional bits.
        saved: Error that the step saves.
        gain: Error saved per bit, never more than that of the step before.
    """

    part: int
    width: int
    cost: float
    saved: float
    gain: float


def hull_steps(part: int, costs: np.ndarray, errors: np.ndarray) -> tuple[int, list[Step]]:
    """Returns the width that a part starts with, and its steps in the order of falling gain.

    Args:
        part: Index of the part.
        costs: float64 `[widths]`, increasing.
        errors: float64 `[widths]`; widths that are not allowed have infinite errors.

    Raises:
        ValueError: No width is allowed.
    """
    allowed = np.flatnonzero(np.isfinite(errors))
    if not len(allowed):
        raise ValueError("errors: no width is allowed")
    at = int(allowed[0])
    steps: list[Step] = []
    before = math.inf
    while True:
        later = allowed[allowed > at]
        gain = (errors[at] - errors[later]) / (costs[later] - costs[at])
        if not len(later) or gain.max() <= 0:
            return int(allowed[0]), steps
        to = int(later[gain.argmax()])
        # Of points that lie on a line, rounding may let the gain rise.
        before = min(before, float(gain.max()))
        cost, saved = float(costs[to] - costs[at]), float(errors[at] - errors[to])
        steps.append(Step(part, to, cost, saved, before))
        at = to


def allocate(costs: np.ndarray, errors: np.ndarray, budget: float) -> np.ndarray:
    """Chooses a width per part.

    Args:
        costs: float64 `[parts, widths]`, bits per token, increasing along each row.
        errors: float64 `[parts, widths]`; infinite for widths that are not allowed.
        budget: Bits per token of all parts together.

    Returns:
        int64 `[parts]`, indices of widths whose costs do not exceed the budget.

    Raises:
        ValueError: The smallest widths exceed the budget, or a part has no width.
    """
    chosen = np.zeros(len(costs), dtype=np.int64)
    steps: list[Step] = []
    for part in range(len(costs)):
        chosen[part], found = hull_steps(part, costs[part], errors[part])
        steps += found
    rest = budget - float(costs[np.arange(len(costs)), chosen].sum())
    if rest < 0:
        raise ValueError(f"budget: {-rest:.0f} bits per token less than the smallest widths take")
    # Python's sort is stable, which keeps the steps of a part in order where gains are equal.
    steps.sort(key=lambda step: -step.gain)
    for step in steps:
        if step.cost > rest:
            break  # a later step of this part would leave a gap
        chosen[step.part] = step.width
        rest -= step.cost
    return _spend(costs, errors, chosen, rest)


def _spend(costs: np.ndarray, errors: np.ndarray, chosen: np.ndarray, rest: float) -> np.ndarray:
    """Widens single parts as long as what is left of the budget suffices and it saves errors."""
    parts = np.arange(len(costs))
    while True:
        cost = costs - costs[parts, chosen][:, None]
        saved = errors[parts, chosen][:, None] - errors
        gain = np.where((cost > 0) & (cost <= rest), saved, 0.0) / np.where(cost > 0, cost, 1.0)
        part, width = np.unravel_index(gain.argmax(), gain.shape)
        if gain[part, width] <= 0:
            return chosen
        rest -= float(cost[part, width])
        chosen[part] = width
