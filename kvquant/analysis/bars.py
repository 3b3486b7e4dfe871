"""The bar of a claim: where it begins to hold, and on which side an interval lies."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """The bar of a claim.

    Attributes:
        limit: Where the claim begins to hold; NaN where a test decides.
        at_most: Values below the limit are right, else those above.
        words: How it reads, where that is more than its number.
    """

    limit: float
    at_most: bool
    words: str = ""

    def __str__(self) -> str:
        """Returns the bar as readers see it."""
        return self.words or f"at {'most' if self.at_most else 'least'} {self.limit:g}"

    def met(self, low: float, high: float) -> bool | None:
        """Returns whether an interval lies on the right side of the bar.

        Args:
            low: Lower end.
            high: Upper end.

        Returns:
            None where the interval holds the bar, or an end is not a number.
        """
        if not (math.isfinite(low) and math.isfinite(high)):
            return None
        inside, outside = (
            (high <= self.limit, low > self.limit)
            if self.at_most
            else (low >= self.limit, high < self.limit)
        )
        return True if inside else (False if outside else None)

    def worst(self, ends: tuple[float, float]) -> float:
        """Returns the end of an interval that lies nearest to missing the bar, larger is worse."""
        low, high = ends
        return high if self.at_most else -low
