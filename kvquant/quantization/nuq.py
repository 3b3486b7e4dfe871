"""Non-uniform datatypes: a codebook of `2**bits` levels on [-1, 1], computed or fitted.

`nuq` is fitted to data: the sensitivity-weighted one-dimensional k-means of KVQuant (arXiv
2401.18079, section 3.3), solved exactly by dynamic programming over a histogram instead of by a
randomly started Lloyd iteration (the exact solution is due to Wang and Song, R Journal 3/2, 2011).
`nf` and `uniform` need no data. Names are registered in :mod:`kvquant.study.datatypes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri  # scipy.stats takes a second to import

from kvquant.errors import unknown
from kvquant.study.datatypes import DATATYPES
from kvquant.study.dotted import load

POINT_RANGE = 1e-3  # half of the range of evenly spaced levels for a single point
EVEN_ROUNDS = 30  # of alternating assignment and regression


@dataclass(frozen=True)
class Histogram:
    """A weighted histogram of normalized data on [-1, 1].

    Attributes:
        centers: float64 `[bins]`, increasing.
        weights: float64 `[bins]`, sensitivity weights, not negative.
        counts: float64 `[bins]`, numbers of elements (for Q-Norm).
    """

    centers: np.ndarray
    weights: np.ndarray
    counts: np.ndarray


def kmeans_1d(centers: np.ndarray, weights: np.ndarray, clusters: int) -> np.ndarray:
    """Finds the globally optimal weighted k-means clusters of points on a line.

    Args:
        centers: float64 `[n]`, increasing.
        weights: float64 `[n]`, not negative, not all zero.
        clusters: Number of clusters.

    Returns:
        float64 `[clusters]` sorted cluster means. With fewer points of positive weight than
        clusters, the free levels fall between the points.
    """
    keep = weights > 0
    x, w = centers[keep], weights[keep]
    n = len(x)
    if n == 0:
        raise ValueError("weights: all zero, there is nothing to fit")
    if n <= clusters:
        grid = np.linspace(x[0], x[-1], clusters - n + 2)[1:-1]
        return np.sort(np.concatenate([x, grid]))
    w = w / w.sum()
    mass = np.concatenate([[0.0], np.cumsum(w)])
    first = np.concatenate([[0.0], np.cumsum(w * x)])
    second = np.concatenate([[0.0], np.cumsum(w * x * x)])
    # cost[i, j]: squared error of the points i..j-1 as one cluster
    m = mass[None, :] - mass[:, None]
    f = first[None, :] - first[:, None]
    s = second[None, :] - second[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(m > 0, s - f * f / m, np.inf)
    np.fill_diagonal(cost, np.inf)
    cost[np.tril_indices(n + 1)] = np.inf
    best = cost[0].copy()
    cuts = np.zeros((clusters, n + 1), dtype=np.int64)
    for k in range(1, clusters):
        total = best[:, None] + cost
        cuts[k] = np.argmin(total, axis=0)
        best = total[cuts[k], np.arange(n + 1)]
    levels = np.empty(clusters)
    end = n
    for k in range(clusters - 1, -1, -1):
        begin = int(cuts[k][end]) if k else 0
        levels[k] = (first[end] - first[begin]) / (mass[end] - mass[begin])
        end = begin
    return levels


def q_norm(levels: np.ndarray, histogram: Histogram) -> np.ndarray:
    """Shifts and stretches levels so that quantized data keeps its mean and standard deviation.

    KVQuant's Q-Norm for 2 bits, fitted on the histogram's counts.
    """
    total = histogram.counts.sum()
    if total <= 0:
        return levels
    share = histogram.counts / total
    codes = np.searchsorted((levels[:-1] + levels[1:]) / 2, histogram.centers)
    quantized = levels[codes]
    mean, mean_q = (share * histogram.centers).sum(), (share * quantized).sum()
    spread = np.sqrt((share * (histogram.centers - mean) ** 2).sum())
    spread_q = np.sqrt((share * (quantized - mean_q) ** 2).sum())
    if spread_q == 0:
        return levels
    return (levels - mean_q) * (spread / spread_q) + mean


def fit_nuq(bits: int, histogram: Histogram) -> np.ndarray:
    """Returns levels fitted to data."""
    return kmeans_1d(histogram.centers, histogram.weights, 2**bits)


def normal_float(bits: int, histogram: Histogram | None = None) -> np.ndarray:
    """Returns quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314)."""
    count = 2**bits
    tail = 1.0 - 0.5 * (1 / (2 * count) + 1 / (2 * count - 2))
    upper = ndtri(np.linspace(0.5, tail, count // 2 + 1))[1:]
    lower = -ndtri(np.linspace(0.5, tail, count // 2))[1:]
    levels = np.sort(np.concatenate([lower, [0.0], upper]))
    return levels / np.abs(levels).max()


def uniform(bits: int, histogram: Histogram | None = None) -> np.ndarray:
    """Returns evenly spaced levels, both ends included."""
    return np.linspace(-1.0, 1.0, 2**bits)


def even_levels(points: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Fits evenly spaced levels to weighted points by alternating assignment and regression.

    Given the points' codes, first level and step are a weighted linear regression. The result
    depends on where the alternation starts, so that several ranges are tried.

    Args:
        points: float64 `[n]`.
        weights: float64 `[n]`, not negative, not all zero.
        count: Number of levels, at least two.

    Returns:
        float64 `[count]`, increasing, whose midpoints lie within the points of some weight.
    """
    seen = points[weights > 0]
    low, high = float(seen.min()), float(seen.max())
    if low == high:
        return np.linspace(low - POINT_RANGE, low + POINT_RANGE, count)
    total, middle = weights.sum(), (low + high) / 2
    best: np.ndarray = np.linspace(low, high, count)
    least = math.inf
    for share in (1.0, 0.85, 0.7, 0.55):
        first, step = middle - (high - low) / 2 * share, (high - low) * share / (count - 1)
        for _ in range(EVEN_ROUNDS):
            codes = np.clip(np.rint((points - first) / step), 0, count - 1)
            code, point = weights @ codes / total, weights @ points / total
            spread = weights @ (codes - code) ** 2
            if spread <= 0:
                break
            slope = float(weights @ ((codes - code) * (points - point)) / spread)
            if slope <= 0:
                break
            first, step = point - slope * code, slope
        codes = np.clip(np.rint((points - first) / step), 0, count - 1)
        error = float(weights @ (points - first - step * codes) ** 2)
        # Extrapolated levels could leave no point to the last codes.
        inside = low <= first + step / 2 and first + step * (count - 1.5) <= high
        if inside and error < least:
            best, least = first + step * np.arange(count), error
    return best


def fit(name: str, bits: int, histogram: Histogram | None = None) -> torch.Tensor:
    """Computes the codebook of a registered datatype (:mod:`kvquant.study.datatypes`).

    Args:
        name: The datatype.
        bits: Bits per code.
        histogram: The calibration data; needed by datatypes that are fitted to them.

    Returns:
        fp32 `[2**bits]`, sorted.

    Raises:
        UserError: The datatype is unknown.
        ValueError: The datatype is fitted to data and there are none.
    """
    if name not in DATATYPES:
        raise unknown("datatype", name, DATATYPES)
    datatype = DATATYPES[name]
    if datatype.fitted and histogram is None:
        raise ValueError(f"datatype '{name}' is fitted to calibration data and needs a histogram")
    levels: Callable[[int, Histogram | None], np.ndarray] = load(datatype.levels)
    return torch.from_numpy(np.sort(levels(bits, histogram)).astype(np.float32))
