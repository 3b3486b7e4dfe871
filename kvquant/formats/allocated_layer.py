"""Key ranges, widths and codebooks of one layer whose codes have allocated widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvquant.formats.lane_layout import looked_up
from kvquant.formats.mixed_packing import MAX_WIDTH, PAIRS_PER_TILE, TILE, MixedRows

MAX_LEVELS = 2**MAX_WIDTH
EVEN_ERROR = 0.01  # of a step, by which levels that kernels compute may be off


@dataclass(frozen=True)
class AllocatedLayer:
    """Holds the calibration of one layer for allocated codes, a row of the quantizer file.

    Attributes:
        key_zero: fp32 `[num_kv_heads, head_dim]`, middle of each key channel's range.
        key_scale: fp32 `[num_kv_heads, head_dim]`, half the width of that range.
        key_pairs: fp32 `[num_kv_heads, head_dim / 2]`, the RoPE pairs of each head in the order of
            its tiles, a permutation.
        key_widths: fp32 `[num_kv_heads, tiles]`, bits per code of each tile.
        key_levels: fp32 `[6, 64]`; row `w - 1` begins with the sorted codebook of width `w` on
            normalized keys, and repeats its last level. Codebooks of widths that are not looked up
            (:mod:`kvquant.formats.lane_layout`) are evenly spaced.
        value_scale: fp32 `[num_kv_heads]`, by which the values of each head are divided before the
            range of their token is taken, at least 1.
        value_widths: fp32 `[num_kv_heads]`, bits per code of each head's values.
        value_levels: fp32 `[6, 64]`, codebooks of normalized values, as for keys.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        "key_zero",
        "key_scale",
        "key_pairs",
        "key_widths",
        "key_levels",
        "value_scale",
        "value_widths",
        "value_levels",
    )

    key_zero: torch.Tensor
    key_scale: torch.Tensor
    key_pairs: torch.Tensor
    key_widths: torch.Tensor
    key_levels: torch.Tensor
    value_scale: torch.Tensor
    value_widths: torch.Tensor
    value_levels: torch.Tensor

    @classmethod
    def shapes(cls, bits: float, heads: int, dim: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each table for a model's heads."""
        pairs, levels = dim // 2, (MAX_WIDTH, MAX_LEVELS)
        return {
            "key_zero": (heads, dim),
            "key_scale": (heads, dim),
            "key_pairs": (heads, pairs),
            "key_widths": (heads, pairs // PAIRS_PER_TILE),
            "key_levels": levels,
            "value_scale": (heads,),
            "value_widths": (heads,),
            "value_levels": levels,
        }

    def problem(self) -> str | None:
        """Returns what is wrong with the tables, or None."""
        if bool((self.key_scale < 0).any()):
            return "key_scale has a negative range"
        if not bool((self.value_scale >= 1).all()):  # others could make values infinite
            return "value_scale has a number below 1"
        if (dim := self.key_zero.shape[1]) % TILE:
            return f"key_pairs: head_dim {dim} is not a multiple of {TILE}"
        pairs = torch.arange(self.key_pairs.shape[1], device=self.key_pairs.device)
        if not torch.equal(self.key_pairs.sort(1).values, pairs.expand_as(self.key_pairs).float()):
            return "key_pairs is not a permutation of each head's pairs"
        for name in ("key_widths", "value_widths"):
            widths = getattr(self, name)
            whole = torch.equal(widths, widths.round())
            if not whole or float(widths.min()) < 1 or float(widths.max()) > MAX_WIDTH:
                return f"{name} holds other numbers than 1 to {MAX_WIDTH}"
        for name, widths in (("key_levels", self.key_widths), ("value_levels", self.value_widths)):
            levels = getattr(self, name)
            if bool((levels.diff() < 0).any()):
                return f"{name} is not sorted"
            for width in widths.unique().int().tolist():
                if not bool(levels[width - 1].any()):  # all of them would be read back as zeros
                    return f"{name} has no codebook of width {width}"
                even = width not in looked_up(of_keys=name == "key_levels")
                if even and not evenly_spaced(levels[width - 1, : 2**width]):
                    return f"{name} of width {width} are not evenly spaced"
                if name == "key_levels" and _beyond(levels[width - 1, : 2**width]):
                    return f"{name} of width {width} reach too far beyond [-1, 1]"
        return None

    def to(self, device: torch.device | str) -> AllocatedLayer:
        """Returns a copy of the tables on `device`."""
        return AllocatedLayer(*(getattr(self, name).to(device) for name in self.FIELDS))

    def of_heads(self, heads: slice) -> AllocatedLayer:
        """Returns the tables of some of the kv heads, which share the codebooks."""
        parts = {
            name: getattr(self, name)[heads] for name in self.FIELDS if not name.endswith("_levels")
        }
        return replace(self, **parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(getattr(self, name).nbytes for name in self.FIELDS)

    def key_rows(self) -> MixedRows:
        """Returns the layout of packed keys."""
        return MixedRows(self.key_pairs, self.key_widths)

    def value_rows(self) -> MixedRows:
        """Returns the layout of packed values, whose tiles are in the order of channels."""
        heads, pairs = self.key_pairs.shape
        order = torch.arange(pairs).expand(heads, -1)
        widths = self.value_widths[:, None].expand(-1, pairs // PAIRS_PER_TILE)
        return MixedRows(order, widths, of_keys=False)


def _beyond(levels: torch.Tensor) -> bool:
    """Tells whether an outlier of keys may have another code than that of an end.

    Kernels know the code of an outlier, which lies outside [-1, 1], without reading it.
    """
    ends = torch.stack((levels[0] + levels[1], levels[-2] + levels[-1])).abs() * 0.5
    return bool((ends > 1.0).any())


def evenly_spaced(levels: torch.Tensor) -> bool:
    """Tells whether sorted levels are evenly spaced, so that kernels can compute them."""
    first, last = levels[0].double(), levels[-1].double()
    parts = torch.arange(len(levels), device=levels.device) / (len(levels) - 1)
    far = (levels.double() - first - (last - first) * parts).abs().max()
    return bool(last > first) and bool(far <= EVEN_ERROR * (last - first) / (len(levels) - 1))


def padded_levels(codebooks: dict[int, torch.Tensor]) -> torch.Tensor:
    """Returns codebooks by width as one table fp32 `[6, 64]`; widths that lack one get zeros."""
    out = torch.zeros(MAX_WIDTH, MAX_LEVELS)
    for width, levels in codebooks.items():
        out[width - 1] = levels[-1]
        out[width - 1, : 2**width] = levels
    return out
