"""The histograms that calibration collects, and their file, which is read without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvquant.errors import UserError
from kvquant.formats.layer_quantizer import outliers_per_side
from kvquant.formats.tensor_file import read_info, read_tensors, save_pair
from kvquant.kernels.pytorch_fused import inverse_range, split_outliers

VALUE_BINS = 1024
MAX_LAYERS = 4096
FIELD = "--stats"
AGAIN = "calibrate again"


@dataclass
class LayerStatistics:
    """Holds the histograms of one layer.

    Attributes:
        low: fp32 `[channels]`, left end of each key channel's grid.
        width: fp32 `[channels]`, width of the bins of each key channel.
        counts: fp32 `[channels, bins]`, number of key elements per bin.
        fisher: fp32 `[channels, bins]`, sum of squared key gradients per bin.
        value_counts: fp32 `[fractions, VALUE_BINS]`, number of normalized value elements per bin
            of [-1, 1], for each outlier fraction.
        value_fisher: fp32, the same shape, sum of squared value gradients per bin.
        value_fisher_range2: fp32, the same shape, sum of squared value gradients times the
            token's squared range.
    """

    low: torch.Tensor
    width: torch.Tensor
    counts: torch.Tensor
    fisher: torch.Tensor
    value_counts: torch.Tensor
    value_fisher: torch.Tensor
    value_fisher_range2: torch.Tensor

    @classmethod
    def from_first(cls, keys: torch.Tensor, bins: int, fractions: int) -> LayerStatistics:
        """Makes empty histograms whose grid extends the first window's range by half on each side.

        Args:
            keys: Keys of the first window, fp32 `[tokens, channels]`.
            bins: Number of bins per key channel.
            fractions: Number of outlier fractions.
        """
        channels, device = keys.shape[1], keys.device
        low, high = keys.amin(0), keys.amax(0)
        margin = (high - low).clamp_(min=1e-6) * 0.5

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(
            low - margin,
            (high - low + 2 * margin) / bins,
            zeros(channels, bins),
            zeros(channels, bins),
            zeros(fractions, VALUE_BINS),
            zeros(fractions, VALUE_BINS),
            zeros(fractions, VALUE_BINS),
        )

    def consistent(self, channels: int | None = None) -> bool:
        """Returns whether shapes and signs of the tables are consistent."""
        if self.low.dim() != 1 or self.counts.dim() != 2 or self.value_counts.dim() != 2:
            return False
        keys = (len(self.low), self.counts.shape[1])
        values = (self.value_counts.shape[0], VALUE_BINS)
        tables = (self.counts, self.fisher, self.value_counts, self.value_fisher)
        return (
            channels in (None, keys[0])
            and self.width.shape == self.low.shape
            and all(tuple(t.shape) == keys for t in (self.counts, self.fisher))
            and tuple(self.value_counts.shape) == tuple(self.value_fisher.shape) == values
            and tuple(self.value_fisher_range2.shape) == values
            and bool((self.width > 0).all())
            and all(bool((t >= 0).all()) for t in (*tables, self.value_fisher_range2))
        )

    def _cover(self, keys: torch.Tensor) -> None:
        """Doubles the grid of every channel that new data leaves, merging its bins in pairs."""
        bins = self.counts.shape[1]
        low, high = keys.amin(0), keys.amax(0)
        while True:
            outside = (low < self.low) | (high > self.low + self.width * bins)
            if not bool(outside.any()):
                return
            for table in (self.counts, self.fisher):
                pairs = table[outside].unflatten(1, (bins // 2, 2)).sum(2)
                table[outside] = torch.nn.functional.pad(pairs, (bins // 4, bins // 4))
            self.low = torch.where(outside, self.low - self.width * (bins / 2), self.low)
            self.width = torch.where(outside, self.width * 2, self.width)

    def add_keys(self, keys: torch.Tensor, fisher: torch.Tensor) -> None:
        """Adds keys fp32 `[tokens, channels]` and their squared gradients."""
        channels, bins = self.counts.shape
        self._cover(keys)
        index = ((keys - self.low) / self.width).long().clamp_(0, bins - 1)
        index += torch.arange(channels, device=keys.device) * bins
        flat = index.view(-1)
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(fisher).view(-1))
        self.fisher.view(-1).index_add_(0, flat, fisher.reshape(-1))

    def add_values(
        self, values: torch.Tensor, fisher: torch.Tensor, fractions: list[float]
    ) -> None:
        """Adds values fp32 `[tokens, channels]` and their squared gradients."""
        half = values.to(torch.float16)
        for i, fraction in enumerate(fractions):
            mask, low, high = split_outliers(half, outliers_per_side(fraction, values.shape[1]))
            scale = (high - low) * 0.5
            normalized = (half.float() - (high + low) * 0.5) * inverse_range(scale)
            index = ((normalized + 1.0) * (VALUE_BINS / 2)).long().clamp_(0, VALUE_BINS - 1)
            keep = (~mask).float()
            flat = index.view(-1)
            self.value_counts[i].index_add_(0, flat, keep.view(-1))
            weighted = fisher * keep
            self.value_fisher[i].index_add_(0, flat, weighted.reshape(-1))
            self.value_fisher_range2[i].index_add_(0, flat, (weighted * scale**2).reshape(-1))


def save_statistics(path: Path, layers: list[LayerStatistics], info: dict[str, Any]) -> None:
    """Writes stats.safetensors, then stats.json with the hashes of both."""
    tensors = {
        f"layers.{i}.{name}": tensor
        for i, layer in enumerate(layers)
        for name, tensor in vars(layer).items()
    }
    save_pair(path.with_suffix(".json"), path, info, tensors)


def load_statistics(path: Path) -> tuple[list[LayerStatistics], dict[str, Any]]:
    """Reads the statistics that :func:`save_statistics` wrote.

    Raises:
        UserError: A file is missing, damaged or edited, or the two do not belong together.
    """
    manifest = path.with_suffix(".json")
    info = read_info(manifest, FIELD, AGAIN)
    count = info.get("num_layers")
    if type(count) is not int or not 1 <= count <= MAX_LAYERS:
        raise UserError(f"{FIELD}: {manifest} is damaged (num_layers: {count}): {AGAIN}")
    names = list(LayerStatistics.__dataclass_fields__)
    wanted = {f"layers.{i}.{name}": None for i in range(count) for name in names}
    tensors = read_tensors(path, info["tensors_sha256"], wanted, FIELD, AGAIN)
    layers = []
    for i in range(count):
        layer = LayerStatistics(**{name: tensors[f"layers.{i}.{name}"] for name in names})
        if not layer.consistent(_channels(info)):
            raise UserError(
                f"{FIELD}: {path}: the tables of layer {i} do not fit one another or "
                f"{manifest.name}: {AGAIN}"
            )
        layers.append(layer)
    return layers, info


def _channels(info: dict[str, Any]) -> int | None:
    """Returns the number of key channels per layer, or None if the JSON does not state it."""
    heads, dim = info.get("num_kv_heads"), info.get("head_dim")
    return heads * dim if type(heads) is int and type(dim) is int else None
