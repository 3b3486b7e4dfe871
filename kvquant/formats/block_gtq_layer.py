"""Widths of the RoPE pairs of one layer's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvquant.formats.pair_packing import MAX_WIDTH


@dataclass(frozen=True)
class BlockGtqLayer:
    """Holds the calibration of one layer for Block-GTQ, a row of the quantizer file.

    Attributes:
        key_widths: fp32 `[num_kv_heads, head_dim / 2]`, bits per code of each RoPE pair.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("key_widths",)

    key_widths: torch.Tensor

    @classmethod
    def shapes(cls, bits: float, heads: int, dim: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each table for a model's heads."""
        return {"key_widths": (heads, dim // 2)}

    def problem(self) -> str | None:
        """Returns what is wrong with the tables, or None."""
        widths = self.key_widths
        whole = torch.equal(widths, widths.round())
        if not whole or float(widths.min()) < 1 or float(widths.max()) > MAX_WIDTH:
            return f"key_widths holds other numbers than 1 to {MAX_WIDTH}"
        if bool((widths.sum(1) != widths[0].sum()).any()):
            return "key_widths has heads of unequal bits"
        return None

    def to(self, device: torch.device | str) -> BlockGtqLayer:
        """Returns a copy of the tables on `device`."""
        return BlockGtqLayer(self.key_widths.to(device))

    def of_heads(self, heads: slice) -> BlockGtqLayer:
        """Returns the tables of some of the kv heads."""
        return BlockGtqLayer(self.key_widths[heads])

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self.key_widths.nbytes
