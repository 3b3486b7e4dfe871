"""Tests single prompts or windows of text in pairs, which gives the verdicts.

Prompts are nested in the seeds that drew them: an interval resamples seeds and, within each, its
prompts, so that it would show an effect of the seed. Where seeds draw from one set of rows, a row
with all its draws is one unit. Whether more prompts were lost than won is asked by the exact sign
test (McNemar's, where scores are 0 and 1). Windows of text are compared by the mean negative log
likelihood of their tokens, by a paired t-test over windows that do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from kvquant.analysis.paired import TINY, PairedTest

# For each task, the differences of each seed, or of one set of rows that seeds share.
Strata = list[list[np.ndarray]]
EQUAL = 1e-12  # scores that differ by less are rounding


@dataclass(frozen=True)
class SampleTest:
    """The result of comparing units (prompts, rows or windows), in the unit of their scores.

    Attributes:
        n: Number of units.
        won: Units in which the scheme is better than the baseline.
        lost: Units in which it is worse.
        mean: Mean difference (scheme minus baseline): of tasks, of seeds, of units.
        low: Lower end of the confidence interval of the mean; NaN if it cannot be told.
        high: Upper end.
        inner_low: Lower end at level 1 - 2 alpha, by which equivalence is judged.
        inner_high: Upper end.
        p: Two-sided p value; 1 if no unit differs, NaN for a single unit.
    """

    n: int
    won: int
    lost: int
    mean: float
    low: float
    high: float
    inner_low: float
    inner_high: float
    p: float

    @property
    def tied(self) -> int:
        """Returns the units in which both are the same."""
        return self.n - self.won - self.lost


def sign_test(won: int, lost: int) -> float:
    """Returns the exact two-sided p of the sign test, in which ties do not count."""
    if won + lost == 0:
        return 1.0
    return max(TINY, float(stats.binomtest(won, won + lost, 0.5).pvalue))


def clustered_means(strata: Strata, draws: int, seed: int) -> np.ndarray:
    """Returns bootstrap means `[draws]` of tasks' means of seeds' means.

    Args:
        strata: Differences; a task with one array is resampled in it, one with several resamples
            the arrays and then within each.
        draws: Number of draws.
        seed: Seed of the random numbers.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    for clusters in strata:
        sizes = np.array([len(c) for c in clusters])
        flat, first = np.concatenate(clusters), np.concatenate([[0], sizes.cumsum()[:-1]])
        task = np.zeros(draws)
        for _ in clusters:
            chosen = generator.integers(0, len(clusters), draws)
            size = sizes[chosen]
            places = (generator.random((draws, sizes.max())) * size[:, None]).astype(np.int64)
            picked = flat[first[chosen][:, None] + places]
            kept = np.arange(sizes.max()) < size[:, None]
            task += np.where(kept, picked, 0.0).sum(1) / size
        total += task / len(clusters)
    return total / len(strata)


def mean_interval(
    strata: Strata, alpha: float, draws: int, seed: int, bounds: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Returns intervals of levels 1 - alpha and 1 - 2 alpha of a mean (low, high, low, high).

    Percentiles of :func:`clustered_means`. Where nothing varies the bootstrap knows no width; then
    exact binomial bounds say what share of further units may be different (none of n was: at most
    1 - a^(1/n) with confidence 1 - a), and those as far away as scores can be.

    Args:
        strata: Values of every task, each with a unit at least.
        alpha: One minus the level.
        draws: Draws of the bootstrap.
        seed: Seed of the bootstrap.
        bounds: The smallest and the largest value that a unit can have.
    """
    flat = np.concatenate([c for clusters in strata for c in clusters])
    if flat.size < 2:
        return (float("nan"),) * 4
    if np.ptp(flat) <= EQUAL:
        value = float(flat.mean())
        out = []
        for a in (alpha / 2, alpha):
            share = 1 - a ** (1 / flat.size)
            out += [value - share * (value - bounds[0]), value + share * (bounds[1] - value)]
        return out[0], out[1], out[2], out[3]
    means = clustered_means(strata, draws, seed)
    levels = [100 * a for a in (alpha / 2, 1 - alpha / 2, alpha, 1 - alpha)]
    low, high, inner_low, inner_high = (float(v) for v in np.percentile(means, levels))
    return low, high, inner_low, inner_high


def score_test(strata: Strata, alpha: float, draws: int, seed: int) -> SampleTest:
    """Returns sign test and clustered interval for differences of scores between 0 and 1.

    Args:
        strata: Differences (scheme minus baseline) of every task's seeds or rows.
        alpha: One minus the interval's level.
        draws: Draws of the bootstrap.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: A task without a unit.
    """
    if not strata or any(not clusters or min(map(len, clusters)) == 0 for clusters in strata):
        raise ValueError("differences: empty")
    flat = np.concatenate([c for clusters in strata for c in clusters])
    won, lost = int((flat > EQUAL).sum()), int((flat < -EQUAL).sum())
    mean = float(np.mean([np.mean([c.mean() for c in clusters]) for clusters in strata]))
    ends = mean_interval(strata, alpha, draws, seed, (-1.0, 1.0))
    p = sign_test(won, lost) if flat.size > 1 else float("nan")
    return SampleTest(flat.size, won, lost, mean, *ends, p)


def window_test(differences: np.ndarray, test: PairedTest) -> SampleTest:
    """Returns a t-test over windows as a test of units, where lower is better.

    Args:
        differences: Differences of mean negative log likelihoods `[windows]` that share no token.
        test: The t-test of the differences.
    """
    won, lost = int((differences < -EQUAL).sum()), int((differences > EQUAL).sum())
    ends = test.low, test.high, test.inner_low, test.inner_high
    return SampleTest(test.n, won, lost, test.mean, *ends, test.p)


def series_inflation(values: np.ndarray) -> float:
    """Returns how many times the variance of a series' mean exceeds that of independent values.

    Neighbouring windows come from one article and lose alike. Newey and West's estimate (1987) with
    Bartlett weights over the root of third order of n lags; 1 below 20 values, which cannot tell.
    """
    x = values - values.mean()
    total = float((x * x).sum())
    if x.size < 20 or total == 0:
        return 1.0
    lags = round(x.size ** (1 / 3))
    weighted = sum(
        (1 - lag / (lags + 1)) * float((x[lag:] * x[:-lag]).sum()) / total
        for lag in range(1, lags + 1)
    )
    return max(1.0, 1 + 2 * weighted)


def separate_windows(windows: pd.DataFrame) -> pd.DataFrame:
    """Returns windows of a task that share no token, chosen in the order of seeds.

    Where every seed takes the whole text that leaves the first seed's. The choice depends on the
    places alone, so it is the same for every scheme.

    Args:
        windows: Columns `seed`, `start` and `tokens` (scored, one less than the window has).
    """
    chosen: list[int] = []
    taken = np.empty((0, 2), dtype=np.int64)
    for index, row in windows.sort_values(["seed", "start", "tokens"], kind="stable").iterrows():
        low, high = int(row["start"]), int(row["start"]) + int(row["tokens"]) + 1
        if ((taken[:, 0] < high) & (low < taken[:, 1])).any():
            continue
        taken = np.vstack([taken, [low, high]])
        chosen.append(index)  # type: ignore[arg-type]
    return windows.loc[chosen]
