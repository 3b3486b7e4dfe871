"""Levels of many bits: near the limit for fine quantizers, and each the mean of its interval."""

from __future__ import annotations

import math

import pytest
import torch

from kvquant.quantization.lloyd_max import MAX_BITS, lloyd_max

LIMIT = math.sqrt(3) * math.pi / 2  # of the error times 4**bits (Panter and Dite, 1951)


def normal(points: int) -> torch.Tensor:
    """Quantiles of a standard normal variable, the tails of which are fine enough for 8 bits."""
    even = (torch.arange(points).double() + 0.5) / points
    return torch.distributions.Normal(0.0, 1.0).icdf(even)


def test_error_tends_to_the_limit_from_below() -> None:
    x, found = normal(4_000_000), []
    for bits in range(5, MAX_BITS + 1):
        levels = torch.tensor(lloyd_max(bits), dtype=torch.float64)
        codes = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        found.append(float((x - levels[codes]).square().mean()) * 4**bits)
    assert found == sorted(found)
    assert found[0] > 0.93 * LIMIT and found[-1] < LIMIT
    assert found[-1] > 0.985 * LIMIT


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_levels_are_means_of_their_intervals(bits: int) -> None:
    levels, x = torch.tensor(lloyd_max(bits), dtype=torch.float64), normal(4_000_000)
    codes = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    sums = torch.zeros_like(levels).index_add_(0, codes, x)
    means = sums / codes.bincount(minlength=len(levels))
    inner = slice(1, -1)  # the outermost intervals hold too few points
    assert (means - levels)[inner].abs().max() < 0.02 * levels.diff().min()
    assert torch.equal(levels, -levels.flip(0))
