"""Blocked sparse storage of exact outliers.

Both matrices are token-major and stored in blocks of `block_size` tokens and one kv head: keys as
the channel x token matrix in CSC form (a token is a column), values as the token x channel matrix
in CSR form (a token is a row). In memory the two are the same thing: a block's entries sorted by
token, then channel. An entry is a 16-bit value and its position inside the block
(`token * head_dim + channel`, 16 bits while a block has at most 65536 elements); one 32-bit pointer
a block says where its entries begin. Row pointers inside a block are not stored: the sorted
positions hold them, and a program that reads a block reads all of its entries anyway.

Blocks are written once and never moved: an append makes a new slab of blocks, costs O(appended)
and touches nothing that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def position_dtype(block_elements: int) -> torch.dtype:
    """int16 (read as unsigned) while positions fit in 16 bits, else int32."""
    return torch.int16 if block_elements <= 65536 else torch.int32


@dataclass(frozen=True)
class SparseSlab:
    """The outliers of some blocks.

    Attributes:
        pointers: int32 `[blocks * num_heads + 1]`, first entry of each (block, head).
        positions: int16/int32 `[entries]`, `token * head_dim + channel` in the block.
        values: fp16/bf16 `[entries]`.
        shape: `(blocks, num_heads, block_size, head_dim)`.
    """

    pointers: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int, int, int]

    @classmethod
    def from_mask(cls, x: torch.Tensor, mask: torch.Tensor) -> SparseSlab:
        """Gathers the marked elements.

        Args:
            x: fp16/bf16 `[blocks, num_heads, block_size, head_dim]`.
            mask: bool, the same shape.
        """
        blocks, heads, tokens, dim = x.shape
        flat = mask.reshape(blocks * heads, tokens * dim)
        counts = flat.sum(-1, dtype=torch.int32)
        pointers = torch.zeros(blocks * heads + 1, dtype=torch.int32, device=x.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=pointers[1:])
        entries = flat.view(-1).nonzero().view(-1)
        values = x.reshape(-1).index_select(0, entries)
        inside = entries % (tokens * dim)
        kind = position_dtype(tokens * dim)
        if kind is torch.int16:  # two's complement of the unsigned position
            inside = torch.where(inside >= 32768, inside - 65536, inside)
        return cls(pointers, inside.to(kind), values, (blocks, heads, tokens, dim))

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.pointers.nbytes + self.positions.nbytes + self.values.nbytes

    def unsigned_positions(self) -> torch.Tensor:
        """int64 `[entries]` positions inside their blocks."""
        wide = self.positions.long()
        return wide & 0xFFFF if self.positions.dtype is torch.int16 else wide

    def flat_index(self) -> torch.Tensor:
        """int64 `[entries]` index of each entry in the flattened `shape`."""
        _, _, tokens, dim = self.shape
        counts = (self.pointers[1:] - self.pointers[:-1]).long()
        group = torch.repeat_interleave(
            torch.arange(counts.numel(), device=counts.device),
            counts,
            output_size=self.values.numel(),
        )
        return group * (tokens * dim) + self.unsigned_positions()

    def put_into(self, dense: torch.Tensor) -> None:
        """Overwrites the outliers' places of `dense` (contiguous, of `shape`) by their values."""
        dense.view(-1).index_copy_(0, self.flat_index(), self.values.to(dense.dtype))

    def select(self, blocks: torch.Tensor) -> SparseSlab:
        """The given blocks (int64 `[n]`, repeats allowed) as a new slab."""
        _, heads, tokens, dim = self.shape
        groups = (blocks[:, None] * heads + torch.arange(heads, device=blocks.device)).view(-1)
        begin = self.pointers[:-1].long().index_select(0, groups)
        counts = self.pointers[1:].long().index_select(0, groups) - begin
        pointers = torch.zeros(groups.numel() + 1, dtype=torch.int32, device=blocks.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=pointers[1:])
        total = int(pointers[-1])
        shift = torch.repeat_interleave(begin - pointers[:-1].long(), counts, output_size=total)
        entries = torch.arange(total, device=blocks.device) + shift
        return SparseSlab(
            pointers,
            self.positions.index_select(0, entries),
            self.values.index_select(0, entries),
            (int(blocks.numel()), heads, tokens, dim),
        )


class _BlockedTokenMajor:
    """Outliers of one sequence, block after block."""

    def __init__(self, num_heads: int, head_dim: int, block_size: int) -> None:
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if block_size < 1:
            raise ValueError(f"block_size: must be at least 1, got {block_size}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.slabs: list[SparseSlab] = []

    def append(self, slab: SparseSlab) -> None:
        """Adds a slab of blocks; O(1), nothing stored is touched."""
        expected = (self.num_heads, self.block_size, self.head_dim)
        if slab.shape[1:] != expected:
            raise ValueError(f"slab: blocks of shape {slab.shape[1:]}, expected {expected}")
        self.slabs.append(slab)

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return sum(slab.shape[0] for slab in self.slabs) * self.block_size

    @property
    def nnz(self) -> int:
        """Stored outliers."""
        return sum(slab.values.numel() for slab in self.slabs)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self.slabs)

    def _token_major(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compressed pointers by token, channel indices `head * head_dim + channel`, values."""
        tokens, channels, values = [], [], []
        base = 0
        for slab in self.slabs:
            blocks, heads, size, dim = slab.shape
            index = slab.flat_index()
            block, rest = index // (heads * size * dim), index % (heads * size * dim)
            head, inside = rest // (size * dim), rest % (size * dim)
            tokens.append(base + block * size + inside // dim)
            channels.append(head * dim + inside % dim)
            values.append(slab.values)
            base += blocks * size
        if not tokens:
            empty = torch.zeros(0, dtype=torch.int64)
            return torch.zeros(1, dtype=torch.int64), empty, torch.zeros(0, dtype=torch.float16)
        token, channel, value = torch.cat(tokens), torch.cat(channels), torch.cat(values)
        order = torch.argsort(token * (self.num_heads * self.head_dim) + channel)
        counts = torch.bincount(token, minlength=base)
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return pointers, channel[order], value[order]


class BlockedCSCMatrix(_BlockedTokenMajor):
    """Key outliers of one sequence: a channel x token matrix whose columns are tokens."""

    def to_standard_csc(self) -> torch.Tensor:
        """A `torch.sparse_csc` tensor `[num_heads * head_dim, tokens]`."""
        pointers, channels, values = self._token_major()
        size = (self.num_heads * self.head_dim, self.num_tokens)
        return torch.sparse_csc_tensor(pointers, channels, values, size=size)


class BlockedCSRMatrix(_BlockedTokenMajor):
    """Value outliers of one sequence: a token x channel matrix whose rows are tokens."""

    def to_standard_csr(self) -> torch.Tensor:
        """A `torch.sparse_csr` tensor `[tokens, num_heads * head_dim]`."""
        pointers, channels, values = self._token_major()
        size = (self.num_tokens, self.num_heads * self.head_dim)
        return torch.sparse_csr_tensor(pointers, channels, values, size=size)
