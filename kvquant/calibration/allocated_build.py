"""Builds quantizers of allocated codes: ranges, widths and codebooks of all layers together.

The loss is expected to rise with the sum of `g**2 * e**2` over all elements, where `g` is the
gradient of the loss and `e` the error (the diagonal of the empirical Fisher matrix, as in KVQuant's
sensitivity weights, arXiv 2401.18079). The histograms of calibration give this sum for each width
that a tile of keys or the values of a head may have. One allocation over the whole model then
spends the bits where they save most. Codebooks are fitted again to the channels of their width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvquant.calibration.bit_allocation import allocate
from kvquant.calibration.build import GRID, bin_centers, key_ranges
from kvquant.calibration.statistics import VALUE_RANGES, LayerStatistics
from kvquant.errors import UserError
from kvquant.formats.allocated_layer import AllocatedLayer, padded_levels
from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.formats.lane_layout import looked_up, max_fitted
from kvquant.formats.mixed_packing import MAX_WIDTH, PAIRS_PER_TILE, TILE
from kvquant.quantization.nuq import even_levels, kmeans_1d
from kvquant.study.schemes import AllocatedScheme

WIDTHS = range(1, MAX_WIDTH + 1)
MAX_HEAD_SCALE = 64.0
ROUNDS = 3  # of fitting codebooks and allocating widths


@dataclass(frozen=True)
class Curves:
    """Weighted histograms of normalized elements, one per row.

    Attributes:
        weights: float64 `[rows, GRID]` over [-1, 1], squared gradients times squared ranges.
        of_keys: Whether the elements are keys; else values.
        bits: Mean bits per element, see :func:`max_fitted`.
    """

    weights: np.ndarray
    of_keys: bool
    bits: float

    def fit(self, width: int, rows: np.ndarray) -> np.ndarray:
        """Returns the sorted levels of a width for some of the rows (bool `[rows]`).

        Levels are evenly spaced where kernels compute them.
        """
        weights = self.weights[rows].sum(0)
        if not weights.any():
            weights = self.weights.sum(0)
        if not weights.any():
            return np.linspace(-1.0, 1.0, 2**width)
        # Four neighbouring bins count as one point, their mean: exact k-means takes quadratic time.
        mass = weights.reshape(-1, 4).sum(1)
        means = (weights * bin_centers(GRID)).reshape(-1, 4).sum(1) / np.where(mass > 0, mass, 1.0)
        points = np.where(mass > 0, means, bin_centers(GRID).reshape(-1, 4).mean(1))
        fitted = width <= max_fitted(self.bits, of_keys=self.of_keys)
        if not fitted or width not in looked_up(of_keys=self.of_keys):
            return even_levels(points, mass, 2**width)
        return kmeans_1d(points, mass, 2**width)

    def errors(self, levels: np.ndarray) -> np.ndarray:
        """Returns the weighted squared error of each row, coded with the given levels."""
        codes = np.searchsorted((levels[:-1] + levels[1:]) / 2, bin_centers(GRID))
        square = (bin_centers(GRID) - levels[codes]) ** 2
        return np.asarray(self.weights @ square)


@dataclass
class _Layer:
    """One layer while its widths are chosen.

    Attributes:
        zero: fp32 `[channels]`, see :func:`key_ranges`.
        scale: fp32 `[channels]`.
        keys: Histograms per key channel.
        values: Histograms per head.
        value_scale: fp32 `[heads]`, see :class:`AllocatedLayer`.
        heads: Number of kv heads.
        pairs: int64 `[heads, head_dim / 2]`, the order of RoPE pairs.
        key_widths: int64 `[heads, tiles]`.
        value_widths: int64 `[heads]`.
        key_levels: Codebooks of keys by width.
        value_levels: Codebooks of values by width.
    """

    zero: torch.Tensor
    scale: torch.Tensor
    keys: Curves
    values: Curves
    value_scale: torch.Tensor
    heads: int
    pairs: np.ndarray
    key_widths: np.ndarray
    value_widths: np.ndarray
    key_levels: dict[int, np.ndarray]
    value_levels: dict[int, np.ndarray]

    @property
    def channels_of_tiles(self) -> np.ndarray:
        """int64 `[heads, tiles, 16]`, indices among all channels of the layer."""
        half = self.pairs.shape[1]
        first = self.pairs.reshape(self.heads, -1, PAIRS_PER_TILE)
        inside = np.concatenate([first, first + half], -1)
        return inside + (np.arange(self.heads) * 2 * half)[:, None, None]

    def fit(self) -> None:
        """Fits the codebooks, each to the channels that have its width if there are any."""
        widths = np.empty(len(self.keys.weights), dtype=np.int64)
        widths[self.channels_of_tiles.reshape(-1)] = np.repeat(self.key_widths.reshape(-1), TILE)
        self.key_levels = {w: self.keys.fit(w, widths == w) for w in WIDTHS}
        self.value_levels = {w: self.values.fit(w, self.value_widths == w) for w in WIDTHS}

    def sort_pairs(self, width: int) -> None:
        """Orders each head's pairs by the error that codes of a given width would make."""
        errors = self.keys.errors(self.key_levels[width]).reshape(self.heads, 2, -1).sum(1)
        self.pairs = np.argsort(-errors, axis=1, kind="stable")

    def errors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns errors by width: `[heads * tiles, 6]` of keys and `[heads, 6]` of values."""
        keys = np.stack([self.keys.errors(self.key_levels[w]) for w in WIDTHS], -1)
        tiles = keys[self.channels_of_tiles].sum(2).reshape(-1, MAX_WIDTH)
        values = np.stack([self.values.errors(self.value_levels[w]) for w in WIDTHS], -1)
        return tiles, values

    def tables(self) -> AllocatedLayer:
        """Returns the layer of the quantizer file."""

        def levels(codebooks: dict[int, np.ndarray]) -> torch.Tensor:
            return padded_levels(
                {w: torch.from_numpy(x.astype(np.float32)) for w, x in codebooks.items()}
            )

        return AllocatedLayer(
            self.zero.view(self.heads, -1).contiguous(),
            self.scale.view(self.heads, -1).contiguous(),
            torch.from_numpy(self.pairs.astype(np.float32)),
            torch.from_numpy(self.key_widths.astype(np.float32)),
            levels(self.key_levels),
            self.value_scale.clone(),
            torch.from_numpy(self.value_widths.astype(np.float32)),
            levels(self.value_levels),
        )


def _key_curves(
    statistics: LayerStatistics,
    zero: torch.Tensor,
    scale: torch.Tensor,
    constant: torch.Tensor,
    bits: float,
) -> Curves:
    """Returns the histograms of normalized inlier keys, rebinned to a grid on [-1, 1]."""
    bins = statistics.counts.shape[1]
    centers = statistics.low[:, None] + (torch.arange(bins) + 0.5) * statistics.width[:, None]
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    normalized = (centers - zero[:, None]) / safe[:, None]
    inlier = (normalized.abs() <= 1.0) & ((scale > 0) & ~constant)[:, None]
    index = ((normalized + 1.0) * (GRID / 2)).long().clamp_(0, GRID - 1)
    weights = statistics.fisher * (scale**2)[:, None] * inlier
    out = torch.zeros(len(scale), GRID, dtype=torch.float64)
    return Curves(out.scatter_add_(1, index, weights.double()).numpy(), of_keys=True, bits=bits)


def _start(statistics: LayerStatistics, spec: AllocatedScheme, heads: int, layer: int) -> _Layer:
    zero, scale, constant = key_ranges(statistics, spec.outliers)
    if spec.outliers == 0 and bool(constant.any()):
        raise UserError(
            f"outliers: 0, but {int(constant.sum())} key channels of layer {layer} were constant "
            "in calibration, so that any other value would be lost: choose outliers > 0"
        )
    histograms = statistics.rotated_fisher_range2
    if histograms is None:
        raise UserError(
            "--stats: was collected by an older version, without rotated values: calibrate again"
        )
    ranges = VALUE_RANGES.index(spec.value_range)
    values = histograms[int(spec.rotation), ranges].double().numpy()
    assert statistics.value_rms is not None
    value_scale = head_scales(statistics.value_rms) if ranges == 0 else torch.ones(heads)
    keys = _key_curves(statistics, zero, scale, constant, spec.bits)
    for name, curves in (("keys", keys.weights), ("values", values)):
        if not curves.any():
            raise UserError(
                f"scheme: all gradients of the {name} of layer {layer} were 0 in calibration, so "
                "that bits cannot be allocated: calibrate in fp32"
            )
    pairs = len(scale) // heads // 2
    nominal = min(max(round(spec.bits), 1), MAX_WIDTH)
    found = _Layer(
        zero,
        scale,
        keys,
        Curves(values, of_keys=False, bits=spec.bits),
        value_scale,
        heads,
        np.tile(np.arange(pairs), (heads, 1)),
        np.full((heads, pairs // PAIRS_PER_TILE), nominal),
        np.full(heads, nominal),
        {},
        {},
    )
    found.fit()
    found.sort_pairs(nominal)
    return found


def head_scales(rms: torch.Tensor) -> torch.Tensor:
    """Returns by what values are divided so that those of all heads become similarly large.

    No number is below 1, so that 16-bit values stay finite, and none above `MAX_HEAD_SCALE`, so
    that a head of tiny values does not make those of all others tiny.

    Args:
        rms: fp32 `[heads]`, root mean square of each head's values.
    """
    least = max(float(rms.min()), float(rms.max()) / MAX_HEAD_SCALE)
    return (rms.cpu() / least).clamp(1.0, MAX_HEAD_SCALE)


def fixed_bits(spec: AllocatedScheme, heads: int, dim: int) -> float:
    """Returns the bits per token and layer of a full block that no width changes.

    These are the exact outliers at their calibrated share, their pointers, and zeros and scales of
    values.
    """
    outliers, elements = 0.0, spec.block_size * dim
    if spec.outliers > 0:
        entry = 16 + 8 * position_dtype(elements).itemsize
        pointer = 8 * (4 + count_dtype(elements).itemsize)
        outliers = spec.outliers * heads * dim * entry + heads * pointer / spec.block_size
    return outliers + 32 * (heads if spec.value_range == "token-head" else 1)


def _allocate(layers: list[_Layer], spec: AllocatedScheme, dim: int) -> np.ndarray:
    """Chooses the widths of some layers together; returns the errors of keys and of values."""
    heads, tiles = layers[0].heads, dim // TILE
    widths = np.array(WIDTHS, dtype=np.float64)
    sizes = np.repeat([TILE, dim], [heads * tiles, heads])
    costs = np.outer(sizes, widths)
    # Values of fewer bits than the mean cost more than their weighted error says.
    least = spec.min_value_width or min(int(spec.bits), MAX_WIDTH)
    errors = []
    for layer in layers:
        keys, values = layer.errors()
        values[:, : least - 1] = math.inf
        errors.append(np.concatenate([keys, values]))
    table = np.concatenate(errors)
    budget = len(layers) * (spec.bits * 2 * heads * dim - fixed_bits(spec, heads, dim))
    try:
        chosen = allocate(np.tile(costs, (len(layers), 1)), table, budget)
    except ValueError as error:
        raise UserError(f"bits: {spec.bits} is too little for this model ({error})") from None
    per_layer = (chosen + 1).reshape(len(layers), -1)
    for layer, found in zip(layers, per_layer, strict=True):
        layer.key_widths = found[: heads * tiles].reshape(heads, tiles)
        layer.value_widths = found[heads * tiles :]
    kept = table[np.arange(len(table)), chosen].reshape(len(layers), -1)
    return np.array([kept[:, : heads * tiles].sum(), kept[:, heads * tiles :].sum()])


def build_allocated(
    statistics: list[LayerStatistics], spec: AllocatedScheme, fractions: list[float], heads: int
) -> tuple[list[AllocatedLayer], dict[str, float]]:
    """Builds the quantizer of all layers.

    Args:
        statistics: Histograms of each layer.
        spec: The scheme.
        fractions: Outlier fractions of the calibration, which concern values and are not needed.
        heads: Number of kv heads.

    Returns:
        The layers, and the weighted squared errors of keys and of values per token.

    Raises:
        UserError: The scheme does not fit the model or the statistics.
    """
    dim = statistics[0].low.numel() // heads
    if dim % TILE:
        raise UserError(f"head_dim: {dim} is not a multiple of {TILE}, as tiles of channels need")
    layers = [_start(x, spec, heads, i) for i, x in enumerate(statistics)]
    groups = [layers] if spec.allocation == "model" else [[layer] for layer in layers]
    total = np.zeros(2)
    for number in range(ROUNDS):
        total = np.sum([_allocate(group, spec, dim) for group in groups], axis=0)
        if number < ROUNDS - 1:
            for layer in layers:
                layer.fit()
    tokens = float(statistics[0].counts[0].sum())
    errors = {"keys": float(total[0]) / tokens, "values": float(total[1]) / tokens}
    return [layer.tables() for layer in layers], errors
