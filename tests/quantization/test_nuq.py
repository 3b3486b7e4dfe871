"""Codebooks: the exact k-means against brute force, registry, Q-Norm."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.quantization.nuq import Histogram, even_levels, fit, kmeans_1d, normal_float, q_norm
from kvquant.study.datatypes import DATATYPES


def _cost(x: np.ndarray, w: np.ndarray, levels: np.ndarray) -> float:
    return float((w * ((x[:, None] - levels[None]) ** 2).min(1)).sum())


def _brute(x: np.ndarray, w: np.ndarray, k: int) -> float:
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), k - 1):
        edges = [0, *cuts, len(x)]
        means = np.array([np.average(x[a:b], weights=w[a:b]) for a, b in itertools.pairwise(edges)])
        best = min(best, _cost(x, w, means))
    return best


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 9), k=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_kmeans_is_globally_optimal(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(-1, 1, n))
    w = rng.uniform(0.1, 5, n)
    levels = kmeans_1d(x, w, k)
    assert np.all(np.diff(levels) >= 0)
    assert _cost(x, w, levels) == pytest.approx(_brute(x, w, k), rel=1e-6, abs=1e-12)


def test_fewer_points_than_levels_keeps_every_point() -> None:
    levels = kmeans_1d(np.array([-0.5, 0.25]), np.array([1.0, 2.0]), 8)
    assert len(levels) == 8
    assert {-0.5, 0.25} <= set(levels.tolist())


def test_weights_pull_levels() -> None:
    x = np.linspace(-1, 1, 101)
    flat = kmeans_1d(x, np.ones(101), 4)
    right = kmeans_1d(x, np.where(x > 0.5, 100.0, 1.0), 4)
    assert (right > 0.5).sum() > (flat > 0.5).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_has_zero_and_spans_the_range(bits: int) -> None:
    levels = normal_float(bits)
    assert len(set(levels.tolist())) == 2**bits
    assert 0.0 in levels
    assert np.abs(levels).max() == 1.0


def test_q_norm_restores_mean_and_spread() -> None:
    rng = np.random.default_rng(0)
    centers = np.linspace(-1, 1, 512)
    counts = np.exp(-((centers - 0.1) ** 2) / 0.08) * rng.uniform(0.9, 1.1, 512)
    histogram = Histogram(centers, counts, counts)
    levels = kmeans_1d(centers, counts, 4)
    fixed = q_norm(levels, histogram)
    codes = np.searchsorted((levels[:-1] + levels[1:]) / 2, centers)
    share = counts / counts.sum()
    mean = (share * centers).sum()
    assert (share * fixed[codes]).sum() == pytest.approx(mean, abs=1e-9)
    spread = np.sqrt((share * (centers - mean) ** 2).sum())
    assert np.sqrt((share * (fixed[codes] - mean) ** 2).sum()) == pytest.approx(spread, rel=1e-6)


def test_unknown_datatype_offers_names() -> None:
    with pytest.raises(UserError, match="did you mean nuq"):
        fit("nuk", 3)


@pytest.mark.parametrize("name", DATATYPES)
def test_every_datatype_gives_sorted_levels(name: str) -> None:
    centers = np.linspace(-0.99, 0.99, 200)
    weights = np.exp(-8 * centers**2)
    histogram = Histogram(centers, weights, weights)
    for bits in (2, 3, 4):
        levels = fit(name, bits, histogram)
        assert levels.shape == (2**bits,) and levels.dtype is torch.float32
        assert bool((levels.diff() > 0).all()) and float(levels.abs().max()) <= 1.0
    if DATATYPES[name].fitted:
        with pytest.raises(ValueError, match=f"datatype '{name}' is fitted to calibration data"):
            fit(name, 3)
    else:
        assert torch.equal(fit(name, 3), fit(name, 3, histogram))


@pytest.mark.parametrize("count", [2, 4, 16, 64])
def test_evenly_spaced_levels_fit_as_well_as_a_search(count: int) -> None:
    """Against all ranges of a grid, for a normal distribution and a skewed one."""
    points = np.linspace(-1, 1, 1025)
    for weights in (np.exp(-8 * points**2), np.exp(-3 * (points + 1)) + 1e-3):
        levels = even_levels(points, weights, count)
        steps = np.diff(levels)
        assert np.allclose(steps, steps[0]) and steps[0] > 0

        def error(low: float, high: float, weights: np.ndarray = weights) -> float:
            step = (high - low) / (count - 1)
            codes = np.clip(np.rint((points - low) / step), 0, count - 1)
            return float(weights @ (points - low - step * codes) ** 2)

        ends = np.linspace(-1, 1, 41)
        best = min(error(a, b) for a in ends for b in ends if b > a)
        assert error(levels[0], levels[-1]) <= best * 1.03
        assert error(levels[0], levels[-1]) <= error(-1.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(2, 30), st.integers(0, 10**6))
def test_evenly_spaced_levels_stay_among_sparse_points(bits: int, some: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = (np.arange(1024) + 0.5) / 512 - 1
    weights = np.zeros(1024)
    chosen = generator.choice(1024, some, replace=False)
    weights[chosen] = generator.exponential(size=some) ** 3
    levels = even_levels(points, weights, 2**bits)
    seen = points[weights > 0]
    assert (np.diff(levels) > 0).all()
    middles = (levels[:-1] + levels[1:]) / 2
    assert middles[0] >= seen.min() - 1e-9 and middles[-1] <= seen.max() + 1e-9


def test_evenly_spaced_levels_of_one_point() -> None:
    points = np.array([-1.0, 0.25, 1.0])
    levels = even_levels(points, np.array([0.0, 3.0, 0.0]), 4)
    assert np.abs(levels - 0.25).max() <= 1.01e-3 and (np.diff(levels) > 0).all()
