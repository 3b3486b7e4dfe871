"""The tensors that packing kernels write to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.formats.blocked_sparse import SparseSlab
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

    def put(self, codes: torch.Tensor, outliers: SparseSlab | None) -> None:
        """Writes blocks that PyTorch packed, behind the outliers that are there, without a sync.

        Args:
            codes: The blocks' codes.
            outliers: Their outliers, whose unused slots lie behind the used ones; None: there are
                none.
        """
        self.codes.copy_(codes)
        if outliers is None:
            return
        assert self.begin is not None and self.count is not None and self.cursor is not None
        assert self.positions is not None and self.values is not None
        # Unused slots go where later outliers will.
        at = self.cursor + torch.arange(outliers.values.numel(), device=codes.device)
        self.positions.index_copy_(0, at, outliers.positions)
        self.values.index_copy_(0, at, outliers.values)
        self.begin.copy_(outliers.begin + self.cursor)
        self.count.copy_(outliers.count)
        self.cursor.add_(outliers.count.sum(dtype=torch.int32))

    def check(self, shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
        """Asserts that blocks `[blocks, num_heads, block_size, head_dim]` fit."""
        blocks, heads, size, dim = shape
        assert self.codes.shape == (blocks, heads, size * packed_bytes(dim, bits))
        for t in (self.codes, self.begin, self.count):
            assert t is None or t.is_contiguous()
        assert self.values is None or self.values.dtype == dtype
