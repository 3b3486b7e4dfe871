"""Bits for the RoPE pairs of a head by their energy (Block-GTQ, arXiv 2606.24033, algorithm 1).

The error of a pair that is coded with `b` bits is taken to be `s * 4**-b`, `s` its energy. A bit
more saves three quarters of what is left, so that bits given one by one to the pair with the
largest error make the sum of errors the smallest.
"""

from __future__ import annotations

import numpy as np


def allocate_pairs(energies: np.ndarray, bits: float, low: int, high: int) -> np.ndarray:
    """Chooses the widths of each head's pairs, which together take `floor(pairs * bits)` bits.

    Args:
        energies: float64 `[heads, pairs]`, not negative.
        bits: Mean bits per code, between `low` and `high`.
        low: Smallest width.
        high: Largest width.

    Returns:
        int64 `[heads, pairs]`; of pairs with equal errors the first one gets a bit first.
    """
    heads, pairs = energies.shape
    widths = np.full((heads, pairs), low, dtype=np.int64)
    rows = np.arange(heads)
    for _ in range(int(pairs * bits) - pairs * low):
        errors = np.where(widths < high, energies * 4.0**-widths, -1.0)
        widths[rows, errors.argmax(1)] += 1
    return widths


def expected_error(energies: np.ndarray, widths: np.ndarray) -> float:
    """Returns the sum of errors that :func:`allocate_pairs` makes small, as a mean over heads."""
    return float((energies * 4.0**-widths).sum(1).mean())
