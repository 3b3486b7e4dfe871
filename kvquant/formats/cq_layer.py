"""The centroids of one layer's keys and values for CQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class CqLayer:
    """Holds the calibration of one layer for CQ, a row of the quantizer file.

    The centroids of all groups of a head's channels lie side by side, so that the shape does not
    depend on how many channels share a code: row `j` holds centroid `j` of each group.

    Attributes:
        key_centroids: fp32 `[num_kv_heads, 2**width, head_dim]`, `width` bits per code, of keys
            before RoPE. All numbers are ones of fp16.
        value_centroids: fp32, the same of values.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("key_centroids", "value_centroids")

    key_centroids: torch.Tensor
    value_centroids: torch.Tensor

    @classmethod
    def shapes(cls, bits: float, heads: int, dim: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each table for the bits of a code and a model's heads."""
        return dict.fromkeys(cls.FIELDS, (heads, 2 ** int(bits), dim))

    def problem(self) -> str | None:
        """Returns what is wrong with the tables, or None."""
        for name in self.FIELDS:
            table = getattr(self, name)
            if not torch.equal(table.half().float(), table):
                return f"{name} holds numbers that fp16 does not have"
        return None

    def to(self, device: torch.device | str) -> CqLayer:
        """Returns a copy of the tables on `device`."""
        return CqLayer(self.key_centroids.to(device), self.value_centroids.to(device))

    def of_heads(self, heads: slice) -> CqLayer:
        """Returns the tables of some of the kv heads."""
        return CqLayer(self.key_centroids[heads], self.value_centroids[heads])

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self.key_centroids.nbytes + self.value_centroids.nbytes
