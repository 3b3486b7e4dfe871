"""Sparse matrices that grow by concatenation, as in KVQuant's public code (`kvquant_ref`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PIECE = 4096  # number of tokens that are dequantized at a time


@dataclass
class Compressed:
    """A compressed sparse matrix with one row per token.

    It is the CSR format of values, and the CSC format of keys, which are stored transposed.

    Attributes:
        pointers: int32 `[tokens + 1]`, where the entries of each token begin.
        channels: int32 `[nonzeros]`, `head * head_dim + channel` of each entry.
        values: fp32 `[nonzeros]`, which are added to the dense part.
        marks: Every `PIECE`-th value of `pointers`, on the host.
        total: The number of nonzeros, on the host.
    """

    pointers: torch.Tensor
    channels: torch.Tensor
    values: torch.Tensor
    marks: list[int]
    total: int = 0

    @classmethod
    def empty(cls, device: torch.device) -> Compressed:
        """Returns a matrix without tokens."""
        none = torch.zeros(0, dtype=torch.int32, device=device)
        return cls(none.new_zeros(1), none, none.float(), [0])

    def read_count(self, counts: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Returns the new pointers and the number of new nonzeros, for which the host waits.

        Args:
            counts: int32 `[new tokens]`, the number of nonzeros per new token.
        """
        ends = counts.cumsum(0, dtype=torch.int32) + self.total
        tokens = self.pointers.numel() - 1
        # The same copy to the host brings the places where the next pieces begin.
        at = list(range(PIECE - 1 - tokens % PIECE, counts.numel(), PIECE))
        *marks, total = (ends[[*at, -1]] if at else ends[-1:]).tolist()
        self.marks += marks
        new, self.total = total - self.total, total
        return ends, new

    def concatenate(
        self, pointers: torch.Tensor, channels: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Appends entries to all three arrays, each of which is allocated anew and copied."""
        self.pointers = torch.cat([self.pointers, pointers])
        self.channels = torch.cat([self.channels, channels])
        self.values = torch.cat([self.values, values])

    def add_to(self, dense: torch.Tensor, piece: int) -> None:
        """Adds the entries of a piece to `dense`, fp32 `[tokens, channels]`."""
        first = self.marks[piece]
        last = self.marks[piece + 1] if piece + 1 < len(self.marks) else self.total
        if first == last:
            return
        tokens, width = dense.shape
        counts = self.pointers[piece * PIECE : piece * PIECE + tokens + 1].long().diff()
        rows = torch.arange(tokens, device=dense.device)
        rows = torch.repeat_interleave(rows, counts, output_size=last - first)
        index = rows * width + self.channels[first:last]
        dense.view(-1).index_add_(0, index, self.values[first:last])

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the three arrays."""
        return self.pointers.nbytes + self.channels.nbytes + self.values.nbytes
