"""The outcome of a claim and its verdict, from a measurement, its interval and how much it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
NOT_ENOUGH, NOT_MEASURED = "not enough evidence", "not measured here"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, NOT_ENOUGH, NOT_MEASURED)
NAN = float("nan")
# What the two ends of a value are.
ROUNDS = "10th to 90th percentile of rounds"
TRIALS = "range of any two trials"


@dataclass(frozen=True)
class Outcome:
    """The measurement for a claim and its verdict.

    Of a claim with several parts (tasks, widths), value and ends are those of the part that is
    nearest to missing the bar, or misses it.

    Attributes:
        measured: All of the measurement in words, or why there is none.
        met: Whether it meets the bar; None where the interval holds the bar or is not known.
        n: How much was measured; None for what was not measured.
        n_of: What `n` counts.
        enough: Whether that reaches the claim's minimum.
        value: The measured value; NaN where it is no number.
        low: The lower end of its interval.
        high: The upper end.
        interval: What the ends are.
        cache: The name of our cache as measured; empty: that of the claim.
        baseline: The name of what it was compared with; empty: that of the claim.
        workload: Task or shape, lengths and batch.
        device: The key of the device of what was timed; empty for accuracy.
        of_model: Whether it was measured on the model of the tables, not on a shape with random
            weights.
    """

    measured: str
    met: bool | None
    n: int | None = None
    n_of: str = ""
    enough: bool = True
    value: float = NAN
    low: float = NAN
    high: float = NAN
    interval: str = ""
    cache: str = ""
    baseline: str = ""
    workload: str = ""
    device: str = ""
    of_model: bool = True

    @property
    def verdict(self) -> str:
        """Returns one of :data:`VERDICTS`."""
        if self.n is None:
            return NOT_MEASURED
        if not self.enough or self.met is None or self.n < 1:
            return NOT_ENOUGH
        return SUPPORTED if self.met else NOT_SUPPORTED

    @property
    def evidence(self) -> str:
        """Returns how much was measured, in words; nothing for what was not."""
        return "" if self.n is None else f"{self.n:,} {self.n_of}".strip()

    def lacking(self, parts: Sequence[str]) -> Outcome:
        """Returns the outcome of a claim about several parts of which some are not measured.

        What is measured can show that the claim fails, but not that it holds.

        Args:
            parts: The names of those that are not.
        """
        if not parts or self.n is None:
            return self
        told = f"{self.measured}; not measured yet: {', '.join(parts)}"
        return replace(self, measured=told, met=False if self.met is False else None)


def every(met: Iterable[bool | None]) -> bool | None:
    """Returns whether all parts of a claim meet its bar; None if some may and none fails.

    Args:
        met: What each part is, as :meth:`kvquant.analysis.bars.Bar.met` tells it.
    """
    found = list(met)
    return False if False in found else (None if None in found else True)


def not_measured(reason: str) -> Outcome:
    """Returns the outcome of a claim on which this study has no measurement."""
    return Outcome(reason, None)


def no_record(section: str) -> Outcome:
    """Returns the outcome of a claim that rests on a section of the study without a record."""
    return not_measured(f"not measured yet (section '{section}': no record)")


def over_seeds(alpha: float) -> str:
    """Returns what the ends of :func:`interval` are."""
    return f"{100 * (1 - alpha):g} % interval over seeds"


def interval(differences: np.ndarray, alpha: float) -> tuple[float, float]:
    """Returns Student's interval of the mean of differences `[n]`; NaN for fewer than two."""
    n = differences.size
    if n < 2 or not np.isfinite(differences).all():
        return NAN, NAN
    mean = float(differences.mean())
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * float(differences.std(ddof=1)) / n**0.5
    return mean - half, mean + half
