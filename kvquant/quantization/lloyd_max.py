"""The optimal scalar quantizer of a standard normal variable."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.special import ndtr, ndtri  # scipy.stats takes a second to import

MAX_BITS = 8


@functools.cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """Returns the levels of the optimal scalar quantizer of a standard normal variable.

    The algorithm (Max, 1960; Lloyd, 1982) alternates between the two conditions of an optimum: each
    edge lies halfway between two levels, and each level lies at the mean of its interval. With many
    levels it is slow, so it then starts from the levels that are best in the limit (Panter and
    Dite, 1951), which are those of a normal variable of three times the variance.
    """
    count = 2**bits
    levels = ndtri((np.arange(count) + 0.5) / count) * (1.0 if bits <= 4 else math.sqrt(3.0))
    for _ in range(2000):
        edges = np.concatenate([[-np.inf], (levels[:-1] + levels[1:]) / 2, [np.inf]])
        mass = np.diff(ndtr(edges))
        levels = -np.diff(np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)) / mass
    return tuple((levels - levels[::-1]) / 2)  # exactly symmetric
