"""The histograms that calibration collects, and their file, which is read without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvquant.calibration.key_histograms import ROPED, KeyHistograms, empty_histograms
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
class LayerStatistics(KeyHistograms):
    """Holds the histograms of one layer: of keys before RoPE those of the base class.

    Attributes:
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
        roped_low: fp32 `[channels]`, as `low` of keys after RoPE; this and the next three are None
            unless the study names a scheme that quantizes keys after RoPE.
        roped_width: fp32 `[channels]`, as `width`.
        roped_counts: fp32 `[channels, bins]`, as `counts`.
        roped_fisher: fp32 `[channels, bins]`, as `fisher`.
    """

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
    roped_low: torch.Tensor | None = None
    roped_width: torch.Tensor | None = None
    roped_counts: torch.Tensor | None = None
    roped_fisher: torch.Tensor | None = None

    def cpu(self) -> LayerStatistics:
        """Returns the statistics on the CPU, where quantizers are built."""
        tensors: dict[str, Any] = {
            name: None if tensor is None else tensor.cpu() for name, tensor in vars(self).items()
        }
        return LayerStatistics(**tensors)

    @classmethod
    def from_first(
        cls, keys: torch.Tensor, bins: int, fractions: int, heads: int
    ) -> LayerStatistics:
        """Makes empty statistics (:func:`empty_histograms` makes those of keys).

        Args:
            keys: Keys of the first window, fp32 `[tokens, channels]`.
            bins: Number of bins per key channel.
            fractions: Number of outlier fractions.
            heads: Number of kv heads.
        """
        channels, device = keys.shape[1], keys.device
        square = (heads, channels // heads, channels // heads)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(
            **vars(empty_histograms(keys, bins)),
            value_counts=zeros(fractions, VALUE_BINS),
            value_fisher=zeros(fractions, VALUE_BINS),
            value_fisher_range2=zeros(fractions, VALUE_BINS),
            rotated_fisher_range2=zeros(2, len(VALUE_RANGES), heads, VALUE_BINS),
            value_rms=zeros(heads),
            **{name: zeros(*square) for name in MOMENTS},
        )

    def consistent(self, channels: int | None = None) -> bool:
        """Returns whether shapes and signs of the tables are consistent."""
        if not self.histograms_consistent() or self.value_counts.dim() != 2:
            return False
        values = (self.value_counts.shape[0], VALUE_BINS)
        tables = (self.value_counts, self.value_fisher, self.value_fisher_range2)
        return (
            channels in (None, len(self.low))
            and all(tuple(table.shape) == values for table in tables)
            and self._moments_consistent()
            and self._sample_consistent()
            and self._roped_consistent()
            and all(bool((table >= 0).all()) for table in tables)
        )

    def _roped_consistent(self) -> bool:
        """Returns whether the histograms of keys after RoPE are all there and fit, or none is."""
        tables = [getattr(self, name) for name in ROPED]
        if any(table is None for table in tables):
            return all(table is None for table in tables)
        roped = self.roped_keys()
        return (
            roped is not None
            and roped.histograms_consistent()
            and roped.counts.shape == self.counts.shape
        )

    def roped_keys(self) -> KeyHistograms | None:
        """Returns the histograms of keys after RoPE; None where calibration kept none."""
        found = {name: getattr(self, table) for table, name in ROPED.items()}
        return None if found["low"] is None else KeyHistograms(**found)

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
    if layers and layers[0].roped_low is not None:
        found["roped_keys"] = True
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
    if info.get("roped_keys") is not True:
        absent |= set(ROPED)
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
