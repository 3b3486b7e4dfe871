"""Blocked sparse storage of exact outliers.

Both matrices are token-major and stored in blocks of `block_size` tokens per kv head: keys as the
channel x token matrix in CSC form (a token is a column), values as the token x channel matrix in
CSR form (a token is a row). In memory the two have the same layout. Each entry of a block is a
16-bit value and its position inside the block (`token * head_dim + channel`, 16 bits while a block
has at most 65536 elements). Two tables hold the first entry and the number of entries per block.
Pointers inside a block are not stored, because the positions imply them and a thread block reads
all entries of a block anyway. The order of entries in a block depends on the packer: PyTorch sorts
by token, then channel, and kernels write in the order in which their threads arrive. The standard
forms (`to_standard_csc`, `to_standard_csr`) sort.

Entries live in arenas that are allocated ahead. Appending writes behind the last entry, moves
nothing and costs O(appended). :mod:`kvquant.cache.reclaim` frees the entries of dead blocks
together with the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvquant.errors import UserError

Shape = tuple[int, int, int, int]
Index = slice | torch.Tensor


def position_dtype(block_elements: int) -> torch.dtype:
    """Returns int16 (read as unsigned) if positions in a block fit in 16 bits, else int32."""
    return torch.int16 if block_elements <= 65536 else torch.int32


def count_dtype(block_elements: int) -> torch.dtype:
    """Returns int16 if the number of entries of a full block fits, else int32."""
    return torch.int16 if block_elements <= 32767 else torch.int32


def check_entries(number: int) -> int:
    """Returns `number`, the entries of one arena, if 32-bit offsets can address them.

    Raises:
        UserError: They cannot.
    """
    if number >= 1 << 31:
        raise UserError(
            f"outliers: {number} in one layer and call are more than 32-bit offsets can address: "
            "feed the prompt in smaller chunks or fewer sequences, or keep fewer outliers"
        )
    return number


@dataclass(frozen=True)
class SparseSlab:
    """Holds the outliers of some blocks.

    Attributes:
        begin: int32 `[blocks, num_heads]`, first entry of each (block, head).
        count: int16/int32 `[blocks, num_heads]`, number of entries of each (block, head).
        positions: int16/int32 `[slots]`, `token * head_dim + channel` in the block, per entry.
        values: fp16/bf16 `[slots]`, per entry.
        shape: `(blocks, num_heads, block_size, head_dim)`.
        excess: int32 scalar, number of outliers that found no slot (see :meth:`from_mask`), or
            None where slots are counted exactly.
        cursor: int32 `[1]`, first free slot, while a kernel still fills the arrays; else None.
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
        """Allocates an empty slab that a kernel fills block by block.

        Args:
            shape: `(blocks, num_heads, block_size, head_dim)`.
            slots: Number of entries to allocate.
            dtype: dtype of the values.
            device: Device of all tensors.
        """
        blocks, heads, tokens, dim = shape
        lists, elements, kind = blocks * heads, tokens * dim, count_dtype(tokens * dim)
        sizes = 1, lists, -(-lists * kind.itemsize // 4)
        # One array, because each fill costs the host a launch.
        zeros = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        cursor, begin, count = zeros.split(sizes)
        return cls(
            begin.view(blocks, heads),
            count.view(kind)[:lists].view(blocks, heads),
            torch.empty(slots, dtype=position_dtype(elements), device=device),
            torch.empty(slots, dtype=dtype, device=device),
            shape,
            cursor=cursor,
        )

    @classmethod
    def from_mask(cls, x: torch.Tensor, mask: torch.Tensor, slots: int | None = None) -> SparseSlab:
        """Gathers the elements of `x` that `mask` marks.

        Args:
            x: fp16/bf16 `[blocks, num_heads, block_size, head_dim]`.
            mask: bool, the same shape.
            slots: Number of entries to allocate on a GPU, so that the host need not wait for the
                true number. Elements that do not fit are counted in `excess`. A CPU ignores it and
                allocates exactly what is needed.
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
        dtype = position_dtype(tokens * dim)
        if dtype is torch.int16:  # two's complement of the unsigned position
            inside = torch.where(inside >= 32768, inside - 65536, inside)
        counts = counts.to(count_dtype(tokens * dim))
        table, shape = (blocks, heads), (blocks, heads, tokens, dim)
        return cls(begin.view(table), counts.view(table), inside.to(dtype), values, shape, excess)

    @classmethod
    def gather(cls, slabs: Sequence[SparseSlab]) -> SparseSlab:
        """Copies only the entries of the given blocks to new arrays of exactly their size.

        The host waits for the device once, to learn that size.

        Args:
            slabs: Views of the blocks (:meth:`SparseArena.view`) with equal dtypes and block shape.
        """
        first, device = slabs[0], slabs[0].values.device
        totals = torch.stack([s.count.sum(dtype=torch.int64) for s in slabs]).tolist()
        slots = check_entries(sum(totals))
        count = torch.cat([s.count for s in slabs])
        ends = count.reshape(-1).cumsum(0, dtype=torch.int32)
        # At least one slot: kernels need a valid address.
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
        """Bytes of the begin, count, position and value arrays."""
        return self.begin.nbytes + self.count.nbytes + self.positions.nbytes + self.values.nbytes

    @property
    def nnz(self) -> int:
        """Number of stored outliers; reading it waits for the device."""
        return int(self.count.sum())

    def _entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns (block and head, entry, valid) of every stored outlier.

        On a GPU the tensors are padded to the number of slots, and `valid` marks the outliers.
        """
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
        """Returns the int64 flat index into `shape` and the value of every outlier."""
        group, entry, valid = self._entries()
        if valid is not None:
            group, entry = group[valid], entry[valid]
        _, _, tokens, dim = self.shape
        return group * (tokens * dim) + self._inside(entry), self.values.index_select(0, entry)

    def put_into(self, dense: torch.Tensor) -> None:
        """Writes the outliers over their elements of `dense` (contiguous, of `shape`)."""
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
    """Writes the valid values to their indices without a host sync.

    Args:
        flat: `[elements]`, written in place.
        index: int64 `[n]`, distinct where valid, in any order.
        value: `[n]`, the values to write.
        valid: bool `[n]`, which of them to write.
    """
    # Invalid entries all write to element 0, whose own value is then restored.
    first = valid & (index == 0)
    own = torch.where(first.any(), torch.where(first, value, 0.0).sum(), flat[0])
    flat.index_copy_(0, torch.where(valid, index, 0), value)
    flat[0] = own


class SparseArena:
    """Preallocated memory for the outliers of `blocks` blocks, filled in order.

    Args:
        blocks: Number of blocks.
        first: The first blocks to be stored, which predict how many entries a block needs.
    """

    def __init__(self, blocks: int, first: SparseSlab) -> None:
        count, heads, tokens, dim = first.shape
        like = first.values
        self.shape = (heads, tokens, dim)
        self._cursor, self._excess = first.cursor, first.excess
        # For each `put`: its first block, and segments and used entries of the last one before it.
        self._puts: list[tuple[int, int, int]] = []
        if blocks == count:  # full at once: `first` is kept without a copy
            self.begin, self.count = first.begin, first.count
            self._positions, self._values = [first.positions], [first.values]
            self._used = like.numel()
            return
        self.begin = first.begin.new_zeros((blocks, heads))
        self.count = first.count.new_zeros((blocks, heads))
        # More blocks follow: exact counts get a quarter more than the first blocks took.
        margin = 4 if like.is_cuda else 5
        slots = -(-like.numel() * blocks * margin // (count * 4)) + 32
        self._positions = [first.positions.new_empty(slots)]
        self._values = [like.new_empty(slots)]
        self._used = 0

    def put(self, at: int, slab: SparseSlab) -> None:
        """Stores blocks `at`, `at + 1`, ... without dropping or moving an entry."""
        n = slab.values.numel()
        if slab.begin is self.begin:
            return
        check_entries(sum(v.numel() for v in self._values) + n)
        self._puts.append((at, len(self._values), self._used))
        if self._used + n > self._values[-1].numel():
            # More outliers than predicted: a further segment follows the others.
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
        """Forgets the entries of blocks `used` and later without a host sync.

        Args:
            used: First block of an earlier append, at least 1.
        """
        if self._cursor is not None:
            # The kernel's cursor moves back behind the last entry that is kept.
            ends = self.begin[:used] + self.count[:used]
            self._cursor.copy_(ends.amax().view(1))
            return
        while self._puts and self._puts[-1][0] >= used:
            _, segments, self._used = self._puts.pop()
            del self._positions[segments:], self._values[segments:]

    def view(self, blocks: Index) -> SparseSlab:
        """Returns the given blocks, without copying entries if there is one segment.

        Args:
            blocks: Their places, none of them twice: readers on a GPU take no more entries than the
                arena has slots.
        """
        positions = self._positions[0] if len(self._positions) == 1 else torch.cat(self._positions)
        values = self._values[0] if len(self._values) == 1 else torch.cat(self._values)
        begin, count = self.begin[blocks], self.count[blocks]
        shape = (begin.shape[0], *self.shape)
        return SparseSlab(begin, count, positions, values, shape, cursor=self._cursor)

    def crowding(self) -> float:
        """Returns requested entries divided by allocated entries; waits for the device."""
        slots = sum(v.numel() for v in self._values)
        if self._cursor is not None:
            return float(self._cursor) / max(slots, 1)
        return 0.0 if self._excess is None else 1.0 + float(self._excess) / max(slots, 1)

    @property
    def addresses(self) -> list[int]:
        """Addresses of the four arrays, for kernels (a slab from `reserve` has one segment)."""
        arrays = (self.begin, self.count, self._positions[0], self._values[0])
        return [t.data_ptr() for t in arrays]

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        entries = sum(t.nbytes for t in (*self._positions, *self._values))
        return self.begin.nbytes + self.count.nbytes + entries


class _BlockedTokenMajor:
    """Holds the outliers of one sequence, block after block."""

    def __init__(self, slabs: Sequence[SparseSlab]) -> None:
        shapes = {slab.shape[1:] for slab in slabs}
        if len(shapes) > 1:
            raise ValueError(f"slabs: blocks of different shapes {sorted(shapes)}")
        self.slabs = list(slabs)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all blocks."""
        return sum(slab.shape[0] * slab.shape[2] for slab in self.slabs)

    @property
    def nnz(self) -> int:
        """Number of stored outliers; reading it waits for the device."""
        return sum(slab.nnz for slab in self.slabs)

    def _token_major(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Returns pointers per token, channels (`head * head_dim + channel`), values and width."""
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
        """Returns a `torch.sparse_csc` tensor `[num_heads * head_dim, tokens]`."""
        pointers, channels, values, width = self._token_major()
        size = (width, self.num_tokens)
        return torch.sparse_csc_tensor(pointers, channels, values, size=size, check_invariants=True)


class BlockedCSRMatrix(_BlockedTokenMajor):
    """Value outliers of one sequence: a token x channel matrix whose rows are tokens."""

    def to_standard_csr(self) -> torch.Tensor:
        """Returns a `torch.sparse_csr` tensor `[tokens, num_heads * head_dim]`."""
        pointers, channels, values, width = self._token_major()
        size = (self.num_tokens, width)
        return torch.sparse_csr_tensor(pointers, channels, values, size=size, check_invariants=True)
