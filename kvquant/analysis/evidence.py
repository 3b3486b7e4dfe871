"""The outcome of a claim and its verdict, from intervals and bars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
NOT_ENOUGH, NOT_MEASURED = "not enough evidence", "not measured here"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, NOT_ENOUGH, NOT_MEASURED)


@dataclass(frozen=True)
class Outcome:
    """The measurement for a claim and its verdict.

    Attributes:
        value: The measured value with its interval, or why there is none.
        met: Whether it meets the bar; None where the interval holds the bar or is not known.
        evidence: How much was measured; empty for what was not measured.
        enough: Whether the evidence reaches the claim's minimum.
        of_model: Whether it was measured on the model of the tables, not on a shape with random
            weights.
    """

    value: str
    met: bool | None
    evidence: str = ""
    enough: bool = True
    of_model: bool = True

    @property
    def verdict(self) -> str:
        """Returns one of :data:`VERDICTS`."""
        if not self.evidence:
            return NOT_MEASURED
        if not self.enough or self.met is None:
            return NOT_ENOUGH
        return SUPPORTED if self.met else NOT_SUPPORTED


def not_measured(reason: str) -> Outcome:
    """Returns the outcome of a claim on which this study has no measurement."""
    return Outcome(reason, None)


def no_record(section: str) -> Outcome:
    """Returns the outcome of a claim that rests on a section of the study without a record."""
    return not_measured(f"not measured yet (section '{section}': no record)")


def against_bar(low: float, high: float, bar: float, *, at_most: bool) -> bool | None:
    """Returns whether an interval lies on the right side of a bar.

    Args:
        low: Lower end.
        high: Upper end.
        bar: Where the claim begins to hold.
        at_most: Values below the bar are right, else those above.

    Returns:
        None where the interval holds the bar, or an end is not a number.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    inside, outside = (high <= bar, low > bar) if at_most else (low >= bar, high < bar)
    return True if inside else (False if outside else None)


def interval(differences: np.ndarray, alpha: float) -> tuple[float, float]:
    """Returns Student's interval of the mean of differences `[n]`; NaN for fewer than two."""
    n = differences.size
    if n < 2 or not np.isfinite(differences).all():
        return float("nan"), float("nan")
    mean = float(differences.mean())
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * float(differences.std(ddof=1)) / n**0.5
    return mean - half, mean + half
