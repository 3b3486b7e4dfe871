"""The transforms of one layer's keys and values for WUSH-KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

MAX_CONDITION = 1e4  # beyond, vectors do not come back from a transform of 16-bit numbers


@dataclass(frozen=True)
class WushLayer:
    """Holds the calibration of one layer for WUSH-KV, a row of the quantizer file.

    Attributes:
        key_transform: fp32 `[num_kv_heads, head_dim, head_dim]`, applied to a head's keys after
            RoPE as column vectors.
        value_transform: fp32, the same of values.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("key_transform", "value_transform")

    key_transform: torch.Tensor
    value_transform: torch.Tensor

    @classmethod
    def shapes(cls, bits: float, heads: int, dim: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each table for a model's heads."""
        return dict.fromkeys(cls.FIELDS, (heads, dim, dim))

    def problem(self) -> str | None:
        """Returns what is wrong with the tables, or None."""
        for name in self.FIELDS:
            sizes = torch.linalg.svdvals(getattr(self, name).double())
            if not bool((sizes[:, 0] < MAX_CONDITION * sizes[:, -1]).all()):
                return f"{name} has a matrix that cannot be undone"
        return None

    def to(self, device: torch.device | str) -> WushLayer:
        """Returns a copy of the tables on `device`."""
        return WushLayer(self.key_transform.to(device), self.value_transform.to(device))

    def of_heads(self, heads: slice) -> WushLayer:
        """Returns the tables of some of the kv heads."""
        return WushLayer(self.key_transform[heads], self.value_transform[heads])

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self.key_transform.nbytes + self.value_transform.nbytes
