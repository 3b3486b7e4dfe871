"""The loss of one scheme over that of another, paired by seed."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from kvquant.analysis.evidence import interval


@dataclass(frozen=True)
class LossRatio:
    """A ratio of two losses.

    Attributes:
        mean: Mean over seeds.
        low: Lower end of its interval.
        high: Upper end.
        seeds: Pairs of seeds.
        lossless: Seeds in which the other scheme lost nothing, where a ratio has no meaning; with
            one of them the ratio is NaN.
        bits: Bits per element of the scheme on these seeds.
        other_bits: Those of the other scheme.
    """

    mean: float
    low: float
    high: float
    seeds: int
    lossless: int
    bits: float
    other_bits: float


def loss_ratio(
    rows: pd.DataFrame, ours: str, theirs: str, baseline: str, alpha: float
) -> LossRatio | None:
    """Returns the ratio of two schemes' losses against the baseline.

    Args:
        rows: Evaluations of one model on one task of a metric that is smaller for a better cache.
        ours: The scheme.
        theirs: The other one.
        baseline: The unquantized cache.
        alpha: Of the interval, so that 0.05 gives one of 95 %.

    Returns:
        None if one of them was not evaluated there.
    """
    values = rows.pivot(index="seed", columns="scheme", values="value")
    if not {ours, theirs, baseline} <= set(values):
        return None
    lost = values[[ours, theirs]].sub(values[baseline], axis=0).dropna()
    bits = rows.groupby("scheme").bits_per_element.mean()
    lossless = int((lost[theirs] <= 0).sum())
    mean = low = high = float("nan")
    if not lossless and len(lost):
        ratios = (lost[ours] / lost[theirs]).to_numpy(dtype=float)
        mean = float(ratios.mean())
        low, high = interval(ratios, alpha)
    return LossRatio(mean, low, high, len(lost), lossless, float(bits[ours]), float(bits[theirs]))
