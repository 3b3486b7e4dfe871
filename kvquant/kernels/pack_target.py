"""The tensors that packing kernels write to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.formats.packing import packed_bytes


@dataclass(frozen=True)
class PackTarget:
    """The tensors that packed blocks go to.

    Without outliers all but `codes` and `status` are None.

    Attributes:
        codes: uint8 `[blocks, num_heads, block_size * row_bytes]`, a contiguous slice.
        status: int32 `[2]`: the number of outliers that found no slot is added to the first; the
            second becomes 1 if the input holds NaN or Inf.
        begin: int32 `[blocks, num_heads]`, contiguous.
        count: int16/int32 `[blocks, num_heads]`, contiguous.
        positions: int16/int32 `[slots]` of the whole arena.
        values: 16-bit `[slots]` of the whole arena.
        cursor: int32 `[1]`, the next free slot; may pass the number of slots.
    """

    codes: torch.Tensor
    status: torch.Tensor
    begin: torch.Tensor | None = None
    count: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    values: torch.Tensor | None = None
    cursor: torch.Tensor | None = None

    def check(self, x: torch.Tensor, bits: int) -> None:
        """Asserts that blocks `[blocks, num_heads, block_size, head_dim]` fit."""
        blocks, heads, size, dim = x.shape
        assert self.codes.shape == (blocks, heads, size * packed_bytes(dim, bits))
        for t in (self.codes, self.begin, self.count):
            assert t is None or t.is_contiguous()
        assert self.values is None or self.values.dtype == x.dtype
