"""Key ranges and codebooks of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch


def outliers_per_side(fraction: float, channels: int) -> int:
    """Returns the value outliers at each end of a token: half the fraction, at least one if > 0.

    Example: 1 % of 4096 channels is 20 at each end (0.98 %); of 192 channels, 1 (1.04 %).
    """
    if fraction <= 0:
        return 0
    return min(max(1, round(fraction * channels / 2)), (channels + 1) // 2)


class LayerTables(Protocol):
    """The calibrated tables of one layer, which a quantizer file holds by the names of fields."""

    FIELDS: ClassVar[tuple[str, ...]]

    @classmethod
    def shapes(cls, bits: float, heads: int, dim: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each table for a scheme's `table_bits` and a model's heads."""

    def problem(self) -> str | None:
        """Returns what is wrong with the tables, which are finite, or None."""

    def to(self, device: torch.device | str) -> Self:
        """Returns a copy of the tables on `device`."""

    def of_heads(self, heads: slice) -> Self:
        """Returns the tables of some of the kv heads."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""


@dataclass(frozen=True)
class LayerQuantizer:
    """Holds the calibrated key ranges and codebooks of one layer, a row of the quantizer file.

    Attributes:
        key_zero: fp32 `[num_kv_heads, head_dim]`, middle of each key channel's range.
        key_scale: fp32 `[num_kv_heads, head_dim]`, half the width of that range; 0 for a channel
            that was constant in calibration, where every other value is an outlier.
        key_levels: fp32 `[2**bits]`, codebook of normalized keys, sorted, on [-1, 1].
        value_levels: fp32 `[2**bits]`, codebook of normalized values, sorted, on [-1, 1].
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("key_zero", "key_scale", "key_levels", "value_levels")

    key_zero: torch.Tensor
    key_scale: torch.Tensor
    key_levels: torch.Tensor
    value_levels: torch.Tensor

    @classmethod
    def shapes(cls, bits: float, heads: int, dim: int) -> dict[str, tuple[int, ...]]:
        """See :meth:`LayerTables.shapes`."""
        channels, levels = (heads, dim), (2 ** int(bits),)
        return dict(zip(cls.FIELDS, (channels, channels, levels, levels), strict=True))

    def problem(self) -> str | None:
        """See :meth:`LayerTables.problem`."""
        for name in ("key_levels", "value_levels"):
            if bool((getattr(self, name).diff() < 0).any()):
                return f"{name} is not sorted"
        return "key_scale has a negative range" if bool((self.key_scale < 0).any()) else None

    def check(self) -> None:
        """Refuses NaN, infinities and negative scales.

        Raises:
            ValueError: A table holds one; the message names the table.
        """
        for name in self.FIELDS:
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name}: NaN or infinite; calibrate again")
        if bool((self.key_scale < 0).any()):
            raise ValueError("key_scale: negative; calibrate again")

    def to(self, device: torch.device | str) -> LayerQuantizer:
        """Returns a copy of the tables on `device`."""
        return LayerQuantizer(
            self.key_zero.to(device),
            self.key_scale.to(device),
            self.key_levels.to(device),
            self.value_levels.to(device),
        )

    def of_heads(self, heads: slice) -> LayerQuantizer:
        """Returns the tables of some of the kv heads, which share the codebooks."""
        return LayerQuantizer(
            self.key_zero[heads], self.key_scale[heads], self.key_levels, self.value_levels
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the four tables."""
        tables = (self.key_zero, self.key_scale, self.key_levels, self.value_levels)
        return sum(t.nbytes for t in tables)
