"""Percentiles by linear interpolation, of all values or of the largest ones alone."""

from __future__ import annotations

from collections.abc import Sequence


def largest_needed(count: int, per_mille: int) -> int:
    """Returns how many of the largest of `count` values a percentile and all above it depend on."""
    return count - (count - 1) * per_mille // 1000


def percentile(values: Sequence[float], per_mille: int, count: int | None = None) -> float:
    """Returns a percentile as numpy and torch define it by default (`linear`).

    In ascending order and counted from 0, the percentile of n values has the place
    (n - 1) * per_mille / 1000. Between two places it is interpolated linearly. Whole numbers find
    the place, so that no rounding moves it to another value.

    Args:
        values: All values or the largest ones, in any order.
        per_mille: The level from 0 to 1000; 990 is the 99th percentile.
        count: Number of all values, where `values` are the largest ones of them.

    Raises:
        ValueError: The percentile depends on more values than there are.
    """
    total = len(values) if count is None else count
    if len(values) < max(1, largest_needed(total, per_mille)):
        raise ValueError(
            f"{len(values)} values are too few for the percentile {per_mille / 10:g} of {total}"
        )
    ordered = sorted(values)
    place, rest = divmod((total - 1) * per_mille, 1000)
    low = place - (total - len(ordered))
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + rest / 1000 * (ordered[high] - ordered[low])
