"""Histograms of keys per channel, whose grids grow with the data, before or after RoPE.

Calibration always keeps those of keys before RoPE. Where a study names a scheme that quantizes keys
after RoPE, the same pass keeps those of rotated keys as well, which need as much memory again.

The gradient of the loss with respect to a rotated key follows from that with respect to the key. A
rotary table multiplies the two channels of a pair by `a R`, where R is a rotation and `a` the
scaling that some variants of RoPE put into their tables (1 in plain RoPE). Gradients are multiplied
by the inverse transpose of that, which is `R / a` because R is orthogonal: the rotated gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.formats.rope import rotate

HISTOGRAMS = ("low", "width", "counts", "fisher")
# The tables of :class:`LayerStatistics` that hold the histograms of keys after RoPE.
ROPED = {f"roped_{name}": name for name in HISTOGRAMS}


@dataclass
class KeyHistograms:
    """Holds a histogram of each key channel of one layer.

    Attributes:
        low: fp32 `[channels]`, left end of each key channel's grid.
        width: fp32 `[channels]`, width of the bins of each key channel.
        counts: fp32 `[channels, bins]`, number of key elements per bin.
        fisher: fp32 `[channels, bins]`, sum of squared key gradients per bin.
    """

    low: torch.Tensor
    width: torch.Tensor
    counts: torch.Tensor
    fisher: torch.Tensor

    def histograms_consistent(self) -> bool:
        """Returns whether shapes and signs of the histograms are consistent."""
        if self.low.dim() != 1 or self.counts.dim() != 2:
            return False
        shape = (len(self.low), self.counts.shape[1])
        tables = (self.counts, self.fisher)
        return (
            self.width.shape == self.low.shape
            and all(tuple(table.shape) == shape for table in tables)
            and bool((self.width > 0).all())
            and all(bool((table >= 0).all()) for table in tables)
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


def empty_histograms(keys: torch.Tensor, bins: int) -> KeyHistograms:
    """Makes empty histograms whose grids extend the first window's range by half on each side.

    Args:
        keys: Keys of the first window, fp32 `[tokens, channels]`.
        bins: Number of bins per key channel.
    """
    low, high = keys.amin(0), keys.amax(0)
    margin = (high - low).clamp_(min=1e-6) * 0.5
    counts = torch.zeros((keys.shape[1], bins), dtype=torch.float32, device=keys.device)
    width = (high - low + 2 * margin) / bins
    return KeyHistograms(low - margin, width, counts, torch.zeros_like(counts))


class RopedKeys:
    """Collects the histograms of keys after RoPE of all layers in one pass.

    Args:
        bins: Number of bins per key channel.
        skip: Number of first tokens of each window that are left out.
    """

    def __init__(self, bins: int, skip: int) -> None:
        self._bins, self._skip = bins, skip
        self._layers: dict[int, KeyHistograms] = {}

    def add(
        self,
        layer: int,
        keys: torch.Tensor,
        gradient: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Adds the keys of a window.

        Args:
            layer: Number of the layer.
            keys: Before RoPE, `[tokens, channels]`.
            gradient: Of the loss with respect to these keys, the same shape.
            rope: Rotary table of the window, fp32 `[1, tokens, head_dim]` each.
        """
        cos, sin = rope
        # RoPE is orthogonal but for the scaling in its table (see above): g_rot = R g / a, and the
        # table rotates by a R.
        square = (cos.square() + sin.square()).unsqueeze(1)
        x, g = (
            rotate(rows.float().unflatten(1, (-1, cos.shape[-1])).transpose(0, 1)[None], cos, sin)
            for rows in (keys, gradient)
        )
        x, g = (rows[0].transpose(0, 1).flatten(1)[self._skip :] for rows in (x, g / square))
        if layer not in self._layers:
            self._layers[layer] = empty_histograms(x, self._bins)
        self._layers[layer].add_keys(x, g.square())

    def of_layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Returns the tables of a layer by their names in :class:`LayerStatistics`."""
        return {name: getattr(self._layers[layer], mine) for name, mine in ROPED.items()}
