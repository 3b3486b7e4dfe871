"""Blocked sparse storage of exact outliers.

Both matrices are token-major and stored in blocks of `block_size` tokens and one kv head: keys as
the channel x token matrix in CSC form (a token is a column), values as the token x channel matrix
in CSR form (a token is a row). In memory the two are the same thing: a block's entries, each a
16-bit value and its position inside the block (`token * head_dim + channel`, 16 bits while a block
has at most 65536 elements). Where a block's entries begin, and how many there are, stands beside
them. Pointers inside a block are not stored: the positions hold them, and a program that reads a
block reads all of its entries. Their order in a block is the packer's own (PyTorch's is by token,
then channel; kernels write as their threads come), and the standard forms sort.

Entries live in arenas that are allocated ahead; an append writes behind what is there, moves
nothing and costs O(appended). Entries of dead blocks are given back with the blocks
(:mod:`kvquant.cache.reclaim`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvquant.errors import UserError

Shape = tuple[int, int, int, int]
Index = slice | torch.Tensor


def position_dtype(block_elements: int) -> torch.dtype:
    """int16 (read as unsigned) while positions fit in 16 bits, else int32."""
    return torch.int16 if block_elements <= 65536 else torch.int32


def count_dtype(block_elements: int) -> torch.dtype:
    """int16 while the count of a full block fits, else int32."""
    return torch.int16 if block_elements <= 32767 else torch.int32


def check_entries(number: int) -> int:
    """Returns a number of entries of one arena.

    Raises:
        UserError: Offsets, which have 32 bits, cannot count them.
    """
    if number >= 1 << 31:
        raise UserError(
            f"outliers: {number} of one layer in one call are more than 32-bit offsets can count; "
            "feed the prompt in smaller chunks or fewer sequences, or keep fewer outliers"
        )
    return number


@dataclass(frozen=True)
class SparseSlab:
    """The outliers of some blocks.

    Attributes:
        begin: int32 `[blocks, num_heads]`, first entry of each (block, head).
        count: int16/int32 `[blocks, num_heads]`, number of its entries.
        positions: int16/int32 `[slots]`, `token * head_dim + channel` in the block.
        values: fp16/bf16 `[slots]`.
        shape: `(blocks, num_heads, block_size, head_dim)`.
        excess: int32 scalar, outliers that found no slot (see :meth:`from_mask`), or None.
        cursor: int32 `[1]`, first free slot, where a kernel still fills the arrays; else None.
    """

    begin: torch.Tensor
    count: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    shape: Shape
    excess: torch.Tensor | None = None
    cursor: torch.Tensor | None = None

    @classmethod
    def reserve(
        cls, shape: Shape, slots: int, dtype: torch.dtype, device: torch.device
    ) -> SparseSlab:
        """Empty room that a kernel fills, a block at a time.

        Args:
            shape: `(blocks, num_heads, block_size, head_dim)`.
            slots: Room for entries.
            dtype: Of the values.
            device: Where.
        """
        blocks, heads, tokens, dim = shape
        table, elements = (blocks, heads), tokens * dim
        return cls(
            torch.zeros(table, dtype=torch.int32, device=device),
            torch.zeros(table, dtype=count_dtype(elements), device=device),
            torch.empty(slots, dtype=position_dtype(elements), device=device),
            torch.empty(slots, dtype=dtype, device=device),
            shape,
            cursor=torch.zeros(1, dtype=torch.int32, device=device),
        )

    @classmethod
    def from_mask(cls, x: torch.Tensor, mask: torch.Tensor, slots: int | None = None) -> SparseSlab:
        """Gathers the marked elements.

        Args:
            x: fp16/bf16 `[blocks, num_heads, block_size, head_dim]`.
            mask: bool, the same shape.
            slots: On a GPU: room for so many entries, so that the host need not wait to learn their
                number; what does not fit is counted in `excess`. Otherwise ignored: exact.
        """
        blocks, heads, tokens, dim = x.shape
        flat = mask.reshape(blocks * heads, tokens * dim)
        counts = flat.sum(-1, dtype=torch.int32)
        ends = counts.cumsum(0, dtype=torch.int32)
        begin, excess = ends - counts, None
        if x.is_cuda and slots is not None:
            found = torch.nonzero_static(flat.view(-1), size=slots, fill_value=0).view(-1)
            excess = (ends[-1] - slots).clamp_(min=0)
            begin = begin.clamp_(max=slots)
            counts = ends.clamp_(max=slots) - begin
        else:
            found = flat.view(-1).nonzero().view(-1)
        values = x.reshape(-1).index_select(0, found)
        inside = found % (tokens * dim)
        kind = position_dtype(tokens * dim)
        if kind is torch.int16:  # two's complement of the unsigned position
            inside = torch.where(inside >= 32768, inside - 65536, inside)
        counts = counts.to(count_dtype(tokens * dim))
        table, shape = (blocks, heads), (blocks, heads, tokens, dim)
        return cls(begin.view(table), counts.view(table), inside.to(kind), values, shape, excess)

    @classmethod
    def gather(cls, slabs: Sequence[SparseSlab]) -> SparseSlab:
        """Copies the entries of some blocks, and no others, to arrays of their own.

        Waits for the device once, as the room is what the entries need.

        Args:
            slabs: Views of the blocks (:meth:`SparseArena.view`), all of one kind.
        """
        first, device = slabs[0], slabs[0].values.device
        totals = torch.stack([s.count.sum(dtype=torch.int64) for s in slabs]).tolist()
        slots = check_entries(sum(totals))
        count = torch.cat([s.count for s in slabs])
        ends = count.reshape(-1).cumsum(0, dtype=torch.int32)
        # never without memory: kernels take the address
        positions, values = (
            first.positions.new_empty(max(slots, 1)),
            first.values.new_empty(max(slots, 1)),
        )
        at = 0
        for slab, total in zip(slabs, totals, strict=True):
            numbers = slab.count.reshape(-1).long()
            groups = torch.arange(numbers.numel(), device=device)
            group = torch.repeat_interleave(groups, numbers, output_size=total)
            shift = slab.begin.reshape(-1) - (numbers.cumsum(0) - numbers)
            entry = shift[group] + torch.arange(total, device=device)
            positions[at : at + total] = slab.positions[entry]
            values[at : at + total] = slab.values[entry]
            at += total
        cursor = None if first.cursor is None else first.cursor.new_full((1,), slots)
        begin = (ends - count.reshape(-1)).view(count.shape)
        shape = (count.shape[0], *first.shape[1:])
        return cls(begin, count, positions, values, shape, cursor=cursor)

    @property
    def nbytes(self) -> int:
        """Bytes of the four arrays."""
        return self.begin.nbytes + self.count.nbytes + self.positions.nbytes + self.values.nbytes

    @property
    def nnz(self) -> int:
        """Stored outliers; waits for the device."""
        return int(self.count.sum())

    def _entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(group, entry, valid) of every stored outlier; on a GPU padded to the slots."""
        count = self.count.reshape(-1).long()
        ends = count.cumsum(0)
        if not count.is_cuda:
            total = int(ends[-1]) if ends.numel() else 0
            group = torch.repeat_interleave(torch.arange(count.numel()), count, output_size=total)
            slot, valid = torch.arange(total), None
        else:
            slot = torch.arange(self.values.numel(), device=count.device)
            group = torch.searchsorted(ends, slot, right=True)
            valid = group < count.numel()
            group = group.clamp_(max=max(count.numel() - 1, 0))
        entry = self.begin.reshape(-1).long()[group] + slot - (ends - count)[group]
        return group, entry if valid is None else torch.where(valid, entry, 0), valid

    def _inside(self, entry: torch.Tensor) -> torch.Tensor:
        wide = self.positions.index_select(0, entry).long()
        return wide & 0xFFFF if self.positions.dtype is torch.int16 else wide

    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 flat index into `shape` and value of every outlier, a block's in stored order."""
        group, entry, valid = self._entries()
        if valid is not None:
            group, entry = group[valid], entry[valid]
        _, _, tokens, dim = self.shape
        return group * (tokens * dim) + self._inside(entry), self.values.index_select(0, entry)

    def put_into(self, dense: torch.Tensor) -> None:
        """Overwrites the outliers' places of `dense` (contiguous, of `shape`) by their values."""
        if self.values.numel() == 0 or dense.numel() == 0:
            return
        flat = dense.view(-1)
        group, entry, valid = self._entries()
        _, _, tokens, dim = self.shape
        index = group * (tokens * dim) + self._inside(entry)
        value = self.values.index_select(0, entry).to(dense.dtype)
        if valid is None:
            flat.index_copy_(0, index, value)
            return
        put_valid(flat, index, value, valid)


def put_valid(
    flat: torch.Tensor, index: torch.Tensor, value: torch.Tensor, valid: torch.Tensor
) -> None:
    """Copies the valid values to their places; the host need not know how many there are.

    Args:
        flat: `[elements]`, changed.
        index: int64 `[n]`, distinct where valid, in any order.
        value: `[n]`.
        valid: bool `[n]`.
    """
    # The others all write to element 0, which then gets its own value again.
    first = valid & (index == 0)
    own = torch.where(first.any(), torch.where(first, value, 0.0).sum(), flat[0])
    flat.index_copy_(0, torch.where(valid, index, 0), value)
    flat[0] = own


class SparseArena:
    """Room for the outliers of `blocks` blocks, filled in order.

    Args:
        blocks: Blocks.
        first: The first blocks to be stored; they say how many entries a block is likely to need.
    """

    def __init__(self, blocks: int, first: SparseSlab) -> None:
        count, heads, tokens, dim = first.shape
        like = first.values
        self.shape = (heads, tokens, dim)
        self._cursor, self._excess = first.cursor, first.excess
        # Of each put: place, segments and entries of the last one before it.
        self._puts: list[tuple[int, int, int]] = []
        if blocks == count:  # full at once: kept as it is, not copied
            self.begin, self.count = first.begin, first.count
            self._positions, self._values = [first.positions], [first.values]
            self._used = like.numel()
            return
        self.begin = first.begin.new_zeros((blocks, heads))
        self.count = first.count.new_zeros((blocks, heads))
        # More to come: where numbers are exact, a quarter above what the first blocks took.
        margin = 4 if like.is_cuda else 5
        slots = -(-like.numel() * blocks * margin // (count * 4)) + 32
        self._positions = [first.positions.new_empty(slots)]
        self._values = [like.new_empty(slots)]
        self._used = 0

    def put(self, at: int, slab: SparseSlab) -> None:
        """Stores blocks `at`, `at + 1`, ...; never drops an entry, never moves one."""
        n = slab.values.numel()
        if slab.begin is self.begin:
            return
        check_entries(sum(v.numel() for v in self._values) + n)
        self._puts.append((at, len(self._values), self._used))
        if self._used + n > self._values[-1].numel():
            # More outliers than foreseen: another segment behind the others.
            self._positions.append(slab.positions.new_empty(n))
            self._values.append(slab.values.new_empty(n))
            self._used = 0
        offset = sum(v.numel() for v in self._values[:-1]) + self._used
        self._positions[-1][self._used : self._used + n] = slab.positions
        self._values[-1][self._used : self._used + n] = slab.values
        self._used += n
        self.begin[at : at + slab.shape[0]] = slab.begin + offset
        self.count[at : at + slab.shape[0]] = slab.count

    def rewind(self, used: int) -> None:
        """Forgets the entries of what was put at place `used` or later; the host does not wait.

        Args:
            used: At least 1, the first place of an append.
        """
        if self._cursor is not None:
            # A kernel's cursor: behind the last entry of what is left.
            ends = self.begin[:used] + self.count[:used]
            self._cursor.copy_(ends.amax().view(1))
            return
        while self._puts and self._puts[-1][0] >= used:
            _, segments, self._used = self._puts.pop()
            del self._positions[segments:], self._values[segments:]

    def view(self, blocks: Index) -> SparseSlab:
        """The given blocks; entries are not copied unless there is more than one segment."""
        positions = self._positions[0] if len(self._positions) == 1 else torch.cat(self._positions)
        values = self._values[0] if len(self._values) == 1 else torch.cat(self._values)
        begin, count = self.begin[blocks], self.count[blocks]
        shape = (begin.shape[0], *self.shape)
        return SparseSlab(begin, count, positions, values, shape, cursor=self._cursor)

    def crowding(self) -> float:
        """Entries asked for over the room for them; waits for the device."""
        slots = sum(v.numel() for v in self._values)
        if self._cursor is not None:
            return float(self._cursor) / max(slots, 1)
        return 0.0 if self._excess is None else 1.0 + float(self._excess) / max(slots, 1)

    @property
    def addresses(self) -> list[int]:
        """Of the four arrays, for kernels; of reserved room only, which has one segment."""
        arrays = (self.begin, self.count, self._positions[0], self._values[0])
        return [t.data_ptr() for t in arrays]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        entries = sum(t.nbytes for t in (*self._positions, *self._values))
        return self.begin.nbytes + self.count.nbytes + entries


class _BlockedTokenMajor:
    """Outliers of one sequence, block after block."""

    def __init__(self, slabs: Sequence[SparseSlab]) -> None:
        shapes = {slab.shape[1:] for slab in slabs}
        if len(shapes) > 1:
            raise ValueError(f"slabs: blocks of different shapes {sorted(shapes)}")
        self.slabs = list(slabs)

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return sum(slab.shape[0] * slab.shape[2] for slab in self.slabs)

    @property
    def nnz(self) -> int:
        """Stored outliers."""
        return sum(slab.nnz for slab in self.slabs)

    def _token_major(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Compressed pointers by token, channels `head * head_dim + channel`, values, width."""
        tokens, channels, values = [], [], []
        base = width = 0
        for slab in self.slabs:
            blocks, heads, size, dim = slab.shape
            index, value = slab.coordinates()
            block, rest = index // (heads * size * dim), index % (heads * size * dim)
            head, inside = rest // (size * dim), rest % (size * dim)
            tokens.append(base + block * size + inside // dim)
            channels.append(head * dim + inside % dim)
            values.append(value)
            base, width = base + blocks * size, heads * dim
        if not tokens:
            empty = torch.zeros(0, dtype=torch.int64)
            return empty.new_zeros(1), empty, torch.zeros(0, dtype=torch.float16), 0
        token, channel, value = torch.cat(tokens), torch.cat(channels), torch.cat(values)
        order = torch.argsort(token * width + channel)
        counts = torch.bincount(token, minlength=base)
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return pointers, channel[order], value[order], width


class BlockedCSCMatrix(_BlockedTokenMajor):
    """Key outliers of one sequence: a channel x token matrix whose columns are tokens."""

    def to_standard_csc(self) -> torch.Tensor:
        """A `torch.sparse_csc` tensor `[num_heads * head_dim, tokens]`."""
        pointers, channels, values, width = self._token_major()
        size = (width, self.num_tokens)
        return torch.sparse_csc_tensor(pointers, channels, values, size=size, check_invariants=True)


class BlockedCSRMatrix(_BlockedTokenMajor):
    """Value outliers of one sequence: a token x channel matrix whose rows are tokens."""

    def to_standard_csr(self) -> torch.Tensor:
        """A `torch.sparse_csr` tensor `[tokens, num_heads * head_dim]`."""
        pointers, channels, values, width = self._token_major()
        size = (self.num_tokens, width)
        return torch.sparse_csr_tensor(pointers, channels, values, size=size, check_invariants=True)
