"""The histograms that calibration collects, and their file, which is read without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvquant.calibration.token_sample import MARKS, SAMPLES
from kvquant.errors import UserError
from kvquant.formats.layer_quantizer import outliers_per_side
from kvquant.formats.tensor_file import read_info, read_tensors, save_pair
from kvquant.kernels.pytorch_fused import inverse_range, split_outliers
from kvquant.quantization.hadamard import factors, rotate

VALUE_BINS = 1024
# What values are normalized by: one range per token, of values divided by their head's root mean
# square; one range per token and head; one range per token.
VALUE_RANGES = ("token", "token-head", "token-unscaled")
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
        rotated_fisher_range2: fp32 `[2, 3, heads, VALUE_BINS]`, sum of squared gradients times
            squared ranges of values that are normalized by their range. First index: as they are,
            or rotated within their head by a Hadamard matrix (zeros where there is none). Second
            index: `VALUE_RANGES`. None in files of older versions.
        value_rms: fp32 `[heads]`, root mean square of each head's values in the first window, or 1
            where all are 0; None as above.
        key_moments: fp32 `[heads, head_dim, head_dim]`, sum of products of two key channels, before
            RoPE; None as above.
        key_gradient_moments: fp32, the same of the gradients of keys.
        value_moments: fp32, the same of values.
        value_gradient_moments: fp32, the same of the gradients of values.
        roped_key_moments: fp32, the same of keys after RoPE.
        roped_query_moments: fp32, the same of queries after RoPE, as a mean over the query heads
            that read a kv head.
        output_moments: fp32, the same of the rows of W_O that a kv head's values are multiplied
            by, as a sum over their query heads.
        key_sample: fp16 `[tokens, channels]`, keys before RoPE of some tokens
            (:mod:`kvquant.calibration.token_sample`); None unless the study names a scheme that
            needs whole tokens.
        key_gradient_sample: bf16, gradients of these keys.
        value_sample: fp16, values of the same tokens.
        value_gradient_sample: bf16, gradients of these values.
        sample_sinks: fp32 `[tokens]`, 0 for tokens drawn at random, which come last; else how many
            first tokens of windows the token stands for.
    """

    low: torch.Tensor
    width: torch.Tensor
    counts: torch.Tensor
    fisher: torch.Tensor
    value_counts: torch.Tensor
    value_fisher: torch.Tensor
    value_fisher_range2: torch.Tensor
    rotated_fisher_range2: torch.Tensor | None = None
    value_rms: torch.Tensor | None = None
    key_moments: torch.Tensor | None = None
    key_gradient_moments: torch.Tensor | None = None
    value_moments: torch.Tensor | None = None
    value_gradient_moments: torch.Tensor | None = None
    roped_key_moments: torch.Tensor | None = None
    roped_query_moments: torch.Tensor | None = None
    output_moments: torch.Tensor | None = None
    key_sample: torch.Tensor | None = None
    key_gradient_sample: torch.Tensor | None = None
    value_sample: torch.Tensor | None = None
    value_gradient_sample: torch.Tensor | None = None
    sample_sinks: torch.Tensor | None = None

    @classmethod
    def from_first(
        cls, keys: torch.Tensor, bins: int, fractions: int, heads: int
    ) -> LayerStatistics:
        """Makes empty histograms whose grid extends the first window's range by half on each side.

        Args:
            keys: Keys of the first window, fp32 `[tokens, channels]`.
            bins: Number of bins per key channel.
            fractions: Number of outlier fractions.
            heads: Number of kv heads.
        """
        channels, device = keys.shape[1], keys.device
        square = (heads, channels // heads, channels // heads)
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
            zeros(2, len(VALUE_RANGES), heads, VALUE_BINS),
            zeros(heads),
            **{name: zeros(*square) for name in MOMENTS},
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
            and self._moments_consistent()
            and self._sample_consistent()
            and bool((self.width > 0).all())
            and all(bool((t >= 0).all()) for t in (*tables, self.value_fisher_range2))
        )

    def _moments_consistent(self) -> bool:
        """Returns whether the tables that older versions lack are all there and fit, or none is."""
        tables = [getattr(self, name) for name in ADDED]
        if all(table is None for table in tables):
            return True
        if any(table is None for table in tables) or tables[0].dim() != 4:
            return False
        heads = tables[0].shape[2]
        if not heads or len(self.low) % heads:
            return False
        square = (heads, len(self.low) // heads, len(self.low) // heads)
        return (
            tuple(tables[0].shape) == (2, len(VALUE_RANGES), heads, VALUE_BINS)
            and bool((tables[0] >= 0).all())
            and tuple(tables[1].shape) == (heads,)
            and bool((tables[1] > 0).all())
            and all(tuple(table.shape) == square for table in tables[2:])
        )

    def _sample_consistent(self) -> bool:
        """Returns whether the tables of drawn tokens are all there and fit, or none is."""
        *tables, marks = (getattr(self, name) for name in (*SAMPLES, MARKS))
        if marks is None or any(table is None for table in tables):
            return marks is None and all(table is None for table in tables)
        shape = (len(marks), len(self.low))
        return (
            marks.dim() == 1
            and bool((marks >= 0).all())
            and all(tuple(table.shape) == shape for table in tables)
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

    def add_moments(self, x: torch.Tensor, gradient: torch.Tensor, *, keys: bool) -> None:
        """Adds second moments of fp32 keys or values `[tokens, channels]` and their gradients."""
        found = (
            (self.key_moments, self.key_gradient_moments)
            if keys
            else (self.value_moments, self.value_gradient_moments)
        )
        for table, rows in zip(found, (x, gradient), strict=True):
            assert table is not None
            table += head_moments(
                rows.unflatten(1, (table.shape[0], -1)).transpose(0, 1), len(table)
            )

    def add_rotated(self, values: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds values fp32 `[tokens, channels]` as allocated codes see them, with their gradients.

        A rotation turns values and gradients alike.
        """
        assert self.rotated_fisher_range2 is not None and self.value_rms is not None
        heads = self.rotated_fisher_range2.shape[2]
        x, g = (rows.unflatten(1, (heads, -1)) for rows in (values, gradient))
        if not bool(self.value_rms.any()):  # the first window
            rms = x.square().mean((0, 2)).sqrt()
            self.value_rms = torch.where(rms > 0, rms, torch.ones_like(rms))
        each = self.value_rms[:, None]
        ranges = ((each, (1, 2)), (None, (2,)), (None, (1, 2)))
        turns = [(x, g)]
        if has_rotation(x.shape[2]):
            turns.append((rotate(x), rotate(g)))
        for turn, (y, slope) in enumerate(turns):
            y = y.to(torch.float16).float()
            for kind, (unit, over) in enumerate(ranges):
                scaled = y if unit is None else y / unit
                low, high = scaled.amin(over, keepdim=True), scaled.amax(over, keepdim=True)
                scale = (high - low) * 0.5
                normalized = (scaled - (high + low) * 0.5) * inverse_range(scale)
                weights = slope * scale * (1.0 if unit is None else unit)
                index = ((normalized + 1.0) * (VALUE_BINS / 2)).long()
                index.clamp_(0, VALUE_BINS - 1)
                index += torch.arange(heads, device=y.device)[:, None] * VALUE_BINS
                table = self.rotated_fisher_range2[turn, kind].view(-1)
                table.index_add_(0, index.view(-1), (weights**2).reshape(-1))

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


MOMENTS = (
    "key_moments",
    "key_gradient_moments",
    "value_moments",
    "value_gradient_moments",
    "roped_key_moments",
    "roped_query_moments",
    "output_moments",
)
ADDED = ("rotated_fisher_range2", "value_rms", *MOMENTS)  # what files of older versions lack


def head_moments(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns second moments by kv head, `[heads, dim, dim]`.

    They are sums over tokens, and means over the heads of `x` that belong to a kv head.

    Args:
        x: fp32 `[a multiple of heads, tokens, dim]`.
        heads: Number of kv heads.
    """
    by_head = x.unflatten(0, (heads, -1)).flatten(1, 2)
    return by_head.mT @ by_head / (len(x) // heads)


def has_rotation(head_dim: int) -> bool:
    """Returns whether vectors of a head's size have a Hadamard rotation."""
    try:
        factors(head_dim)
    except UserError:
        return False
    return True


def save_statistics(path: Path, layers: list[LayerStatistics], info: dict[str, Any]) -> None:
    """Writes stats.safetensors, then stats.json with the hashes of both."""
    tensors = {
        f"layers.{i}.{name}": tensor
        for i, layer in enumerate(layers)
        for name, tensor in vars(layer).items()
        if tensor is not None
    }
    whole = all(layer.rotated_fisher_range2 is not None for layer in layers)
    found = {**info, "moments": whole}
    if layers and (marks := layers[0].sample_sinks) is not None:
        found["samples"] = int((marks == 0).sum())
    save_pair(path.with_suffix(".json"), path, found, tensors)


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
    # Files of older versions lack some tables, which only some kinds of schemes need.
    absent = set() if info.get("moments") is True else set(ADDED)
    if "samples" not in info:
        absent |= {*SAMPLES, MARKS}
    names = [n for n in LayerStatistics.__dataclass_fields__ if n not in absent]
    wanted = {f"layers.{i}.{name}": None for i in range(count) for name in names}
    dtypes = {f"layers.{i}.{name}": SAMPLES[name] for i in range(count) for name in SAMPLES}
    tensors = read_tensors(path, info["tensors_sha256"], wanted, FIELD, AGAIN, dtypes)
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
