"""The allocation of Block-GTQ against its definition and against all allocations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.quantization.pair_widths import allocate_pairs, expected_error


def naive(energies: list[float], bits: float, low: int, high: int) -> list[int]:
    """Algorithm 1 of the paper, bit by bit."""
    widths = [low] * len(energies)
    while sum(widths) < int(len(energies) * bits):
        errors = [s * 4.0**-w if w < high else -1.0 for s, w in zip(energies, widths, strict=True)]
        widths[errors.index(max(errors))] += 1
    return widths


@settings(max_examples=60, deadline=None)
@given(
    logs=st.lists(st.floats(-12, 12), min_size=1, max_size=20),
    bits=st.floats(1.0, 8.0),
    low=st.integers(1, 2),
    high=st.integers(4, 8),
)
def test_it_is_the_algorithm_of_the_paper(
    logs: list[float], bits: float, low: int, high: int
) -> None:
    bits = min(max(bits, low), high)
    energies = 2.0 ** np.array([logs, logs[::-1]])
    found = allocate_pairs(energies, bits, low, high)
    for row, widths in zip(energies.tolist(), found.tolist(), strict=True):
        assert widths == naive(row, bits, low, high)
        assert sum(widths) == int(len(logs) * bits)
    assert found.min() >= low and found.max() <= high


@pytest.mark.parametrize("bits", [1.0, 1.75, 2.5, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_allocation_of_the_bits_has_less_error(bits: float, seed: int) -> None:
    energies = 4.0 ** np.random.default_rng(seed).normal(0, 1.5, (1, 4))
    found = expected_error(energies, allocate_pairs(energies, bits, 1, 5))
    every = [
        expected_error(energies, np.array([widths]))
        for widths in itertools.product(range(1, 6), repeat=4)
        if sum(widths) == int(4 * bits)
    ]
    assert found == pytest.approx(min(every), rel=1e-12)


def test_equal_and_silent_pairs_get_their_bits_from_the_first_on() -> None:
    for energy in (1.0, 0.0):
        widths = allocate_pairs(np.full((1, 4), energy), 2.5, 1, 8)
        assert widths.sum() == 10
    assert allocate_pairs(np.ones((1, 4)), 2.5, 1, 8).tolist() == [[3, 3, 2, 2]]
