"""Paired tests of means: t, interval and equivalence, and Holm's adjustment.

Without spread a t-test is not defined. The p values are then those of exchanging the signs of the
differences, which is exact: of n equal differences 2 of 2^n choices of signs are as extreme
(`2^(1-n)`), and 1 of 2^n lies as far inside the margin. With five seeds that is 0.06, not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

TINY = float(np.finfo(float).tiny)  # no p value is smaller: 0 would be a certainty


@dataclass(frozen=True)
class PairedTest:
    """The result of one paired comparison of means.

    Attributes:
        n: Number of pairs.
        mean: Mean difference (scheme minus baseline).
        low: Lower end of the confidence interval of the mean.
        high: Upper end.
        p: Two-sided paired t-test.
        p_equivalence: TOST: the larger of the two one-sided p values against the margin.
        effect: Cohen's d of paired differences (mean over standard deviation; of several groups,
            over the standard error times the root of n); infinite if there is no spread and the
            mean is not zero.
        inner_low: Lower end of the interval of level 1 - 2 alpha, which lies inside the margin
            exactly where TOST is below alpha.
        inner_high: Upper end.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    p_equivalence: float
    effect: float
    inner_low: float = float("nan")
    inner_high: float = float("nan")


def paired_test(differences: np.ndarray, margin: float, alpha: float) -> PairedTest:
    """Returns paired t-test, interval, TOST and effect size of differences `[n]`.

    Raises:
        ValueError: No difference, or a margin that is negative or no number.
    """
    return grouped_test([differences], margin, alpha)


def grouped_test(
    groups: list[np.ndarray], margin: float, alpha: float, *, inflation: float = 1.0
) -> PairedTest:
    """Tests the mean of groups' mean differences, each group with a variance of its own.

    Degrees of freedom are Welch's and Satterthwaite's; with one group all is the paired t-test.

    Args:
        groups: Differences `[n]` of each group.
        margin: Of equivalence, in the unit of the differences; 0 leaves nothing equivalent.
        alpha: One minus the interval's level.
        inflation: Factor of the mean's variance, where differences are not independent.

    Raises:
        ValueError: A group without a difference, a difference or margin that is no finite number,
            or a margin below 0.
    """
    x = [np.asarray(group, dtype=float) for group in groups]
    if not x or min(group.size for group in x) == 0:
        raise ValueError("differences: empty")
    if not all(np.isfinite(group).all() for group in x):
        raise ValueError("differences: must be finite numbers")
    if not 0 <= margin < np.inf:
        raise ValueError(f"margin: must be a number of at least 0, got {margin}")
    n = sum(group.size for group in x)
    mean = float(np.mean([group.mean() for group in x]))
    if min(group.size for group in x) == 1:
        nan = float("nan")
        return PairedTest(n, mean, nan, nan, nan, nan, nan)
    if all(group.std(ddof=1) <= 1e-12 * max(1.0, abs(group.mean())) for group in x):
        inside = abs(mean) < margin
        same = abs(mean) <= 1e-12
        effect = 0.0 if same else float(np.copysign(np.inf, mean))
        p = 1.0 if same else max(TINY, 2.0 ** (1 - n))
        return PairedTest(
            n, mean, mean, mean, p, max(TINY, 2.0**-n) if inside else 1.0, effect, mean, mean
        )
    parts = np.array([group.var(ddof=1) / group.size for group in x])
    freedom = parts.sum() ** 2 / sum(
        part**2 / (group.size - 1) for part, group in zip(parts, x, strict=True)
    )
    error = float(np.sqrt(parts.sum() * inflation)) / len(x)
    half, inner = (float(stats.t.ppf(1 - a, freedom)) * error for a in (alpha / 2, alpha))
    p = max(TINY, 2 * float(stats.t.sf(abs(mean) / error, freedom)))
    above = float(stats.t.sf((mean + margin) / error, freedom))
    below = float(stats.t.cdf((mean - margin) / error, freedom))
    effect = mean / (error * np.sqrt(n))
    return PairedTest(
        n, mean, mean - half, mean + half, p, max(above, below, TINY), effect,
        mean - inner, mean + inner,
    )  # fmt: skip


def holm(p: np.ndarray) -> np.ndarray:
    """Returns p values after Holm's step-down adjustment (Scand. J. Statistics 6, 1979)."""
    values = np.asarray(p, dtype=float)
    out = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * values[index]))
        out[index] = running
    return out
