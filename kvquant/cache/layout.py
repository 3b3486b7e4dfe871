"""The layout decides on the host, once per forward call for all layers, where tokens are stored.

The batch may be ragged. A sequence consists of its first `sinks` tokens, then as many full blocks
as are older than the last `residual` tokens, then a tail of `residual` to
`residual + block_size - 1` tokens (or fewer while the sequence is short). That state depends on the
sequence alone, not on the batch or on the chunks in which it came. A sequence's table
lists its blocks in order. Beams and copies of a prefix therefore share blocks, and reordering moves
no data. :meth:`Layout.reclaim` frees blocks that no table lists any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvquant.cache.append_plan import AppendPlan as AppendPlan
from kvquant.cache.append_plan import Span as Span
from kvquant.cache.append_plan import View as View
from kvquant.cache.reclaim import ArenaRecord, Reclaim, free_number, reclaim

# An arena after the first grows a cache by 1/GROWTH of its blocks. At most that share is unused,
# and a sequence that becomes eight times as long has about 70 arenas.
GROWTH = 32


@dataclass(frozen=True)
class Snapshot:
    """A state that a layout can return to as long as nothing later has been stored."""

    view: View
    arenas: list[tuple[ArenaRecord, int]]


@dataclass(frozen=True)
class Gather:
    """Blocks of one arena, and where they stand in sequences.

    A block that sequences share (beams, copies of a prefix) is read once: the outliers of a block
    that was chosen twice would not fit into the slots of its arena, by which readers on a GPU,
    which do not wait for the true number, count them.

    Attributes:
        arena: Number of the arena.
        blocks: Places in the arena, each of them once; a slice where they are consecutive.
        sequences: int64 `[n]`, the sequence of each entry in the block tables.
        ordinals: int64 `[n]`, the index of each entry in its sequence, counted from the first block
            asked for.
        shared: int64 `[n]`, which of `blocks` each entry is; None where they are the same.
    """

    arena: int
    blocks: slice | torch.Tensor
    sequences: torch.Tensor
    ordinals: torch.Tensor
    shared: torch.Tensor | None

    def put(self, out: torch.Tensor, blocks: torch.Tensor) -> None:
        """Writes what was read of the blocks to their sequences.

        Args:
            out: `[batch_size, num_heads, blocks per sequence, block_size, head_dim]`.
            blocks: Of `blocks`, `[n, num_heads, block_size, head_dim]`.
        """
        found = blocks if self.shared is None else blocks[self.shared]
        out[self.sequences, :, self.ordinals] = found


@dataclass
class Layout:
    """The layout of a cache: lengths, tails, block tables and arenas.

    Args:
        sinks: Number of first tokens of each sequence kept in 16 bits.
        block_size: Tokens per block.
        residual: Number of most recent tokens that are not packed.
    """

    sinks: int
    block_size: int
    residual: int
    lengths: list[int] = field(default_factory=list)
    tails: list[int] = field(default_factory=list)
    table: list[list[tuple[int, int]]] = field(default_factory=list)
    arenas: list[ArenaRecord] = field(default_factory=list)

    def view(self) -> View:
        """Returns the current state."""
        return View(list(self.lengths), list(self.tails), [len(t) for t in self.table])

    def snapshot(self) -> Snapshot:
        """Returns the current state for :meth:`restore`."""
        return Snapshot(self.view(), [(arena, arena.used) for arena in self.arenas])

    def restore(self, before: Snapshot) -> None:
        """Undoes the appends since a snapshot, of which nothing was stored."""
        view = before.view
        self.table = [t[:n] for t, n in zip(self.table, view.blocks, strict=False)]
        self.lengths, self.tails = list(view.lengths), list(view.tails)
        self.arenas = [arena for arena, _ in before.arenas]
        for arena, used in before.arenas:
            if not arena.shared:  # forks may have taken later places
                arena.rewind(used)

    def append(self, spans: list[Span]) -> AppendPlan:
        """Appends tokens and returns the plan of where they go.

        Args:
            spans: For each sequence, the new columns that are tokens.
        """
        if not spans:
            raise ValueError("input_ids: a batch of 0 sequences")
        if not self.table:
            self.lengths = [0] * len(spans)
            self.tails = [0] * len(spans)
            self.table = [[] for _ in spans]
        before = self.view()
        counts = [s.stop - s.start if isinstance(s, slice) else s.numel() for s in spans]
        new: list[int] = []
        for b, count in enumerate(counts):
            to_sinks = min(max(self.sinks - self.lengths[b], 0), count)
            total = self.tails[b] + count - to_sinks
            blocks = max(0, (total - self.residual) // self.block_size)
            self.lengths[b] += count
            self.tails[b] = total - blocks * self.block_size
            new.append(blocks)
        arena, at, capacity = self._room(sum(new))
        place = at
        for b, blocks in enumerate(new):
            self.table[b] += [(arena, place + i) for i in range(blocks)]
            place += blocks
        decode = all(c == 1 for c in counts) and min(before.lengths) >= self.sinks
        return AppendPlan(spans, before, self.view(), arena, at, capacity, decode)

    def _room(self, blocks: int) -> tuple[int, int, int]:
        """Takes consecutive blocks; returns the arena, the place, and its capacity if new."""
        if not blocks:
            return -1, 0, 0
        # The youngest arena comes first, so that blocks of successive steps are adjacent.
        for number in range(len(self.arenas) - 1, -1, -1):
            if self.arenas[number].room >= blocks:
                return number, self.arenas[number].take(blocks), 0
        used = sum(arena.used for arena in self.arenas)
        spare = sum(arena.room for arena in self.arenas)
        new = ArenaRecord(max(blocks, used // GROWTH - spare))
        number = free_number(self.arenas)
        self.arenas[number : number + 1] = [new]
        return number, new.take(blocks), new.capacity

    def gather(self, view: View, first: int, stop: int, device: torch.device) -> list[Gather]:
        """Finds the blocks with ordinals `[first, stop)` of all sequences, grouped by arena."""
        found: dict[int, list[tuple[int, int, int]]] = {}
        for b, table in enumerate(self.table):
            for ordinal in range(first, min(stop, view.blocks[b])):
                arena, place = table[ordinal]
                found.setdefault(arena, []).append((place, b, ordinal - first))
        out = []
        for arena, rows in found.items():
            numbers: dict[int, int] = {}  # of each place among those that are read
            entries = [(b, i, numbers.setdefault(place, len(numbers))) for place, b, i in rows]
            places = list(numbers)
            # One copy to the device per tensor and forward call, shared by all layers.
            tensor = torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True)
            blocks: slice | torch.Tensor = slice(places[0], places[0] + len(places))
            if places != list(range(places[0], places[0] + len(places))):
                blocks = torch.tensor(places).to(device, non_blocking=True)
            shared = tensor[:, 2] if len(places) < len(rows) else None
            out.append(Gather(arena, blocks, tensor[:, 0], tensor[:, 1], shared))
        return out

    def select(self, order: list[int]) -> None:
        """Keeps or repeats the given sequences; blocks are shared, not copied."""
        self.lengths = [self.lengths[i] for i in order]
        self.tails = [self.tails[i] for i in order]
        self.table = [list(self.table[i]) for i in order]

    def crop(self, lengths: list[int]) -> list[tuple[int, int, int] | None]:
        """Shortens sequences to the given lengths.

        Returns:
            For each sequence `(arena, place, tokens)` of the block that is cut, whose first
            `tokens` tokens become its tail, or None when no block is.
        """
        cut: list[tuple[int, int, int] | None] = []
        for b, length in enumerate(lengths):
            packed = max(0, length - self.sinks)
            if length >= self.lengths[b]:
                cut.append(None)
                continue
            in_blocks = len(self.table[b]) * self.block_size
            if packed >= in_blocks:
                self.tails[b] = packed - in_blocks
                cut.append(None)
            else:
                keep, rest = divmod(packed, self.block_size)
                cut.append((*self.table[b][keep], rest) if rest else None)
                self.table[b] = self.table[b][:keep]
                self.tails[b] = rest
            self.lengths[b] = length
        return cut

    def take_over(self, others: Sequence[Layout]) -> list[int]:
        """Appends the sequences of other layouts of the same scheme, which must not be used again.

        Returns:
            For each of them, what is added to the numbers of its arenas.
        """
        offsets = []
        for other in others:
            offset = len(self.arenas)
            self.arenas += other.arenas
            self.table += [[(a + offset, place) for a, place in t] for t in other.table]
            self.lengths += other.lengths
            self.tails += other.tails
            offsets.append(offset)
        return offsets

    def reclaim(self) -> Reclaim | None:
        """Frees blocks that no sequence lists any more, after :meth:`select` or :meth:`crop`.

        Returns:
            The change that every store has to follow
            (:meth:`~kvquant.cache.block_store.BlockStore.reclaim`), or None.
        """
        return reclaim(self.arenas, self.table)

    def empty(self) -> Layout:
        """Returns an empty layout for the same scheme."""
        return Layout(self.sinks, self.block_size, self.residual)

    def fork(self) -> Layout:
        """Returns a copy that shares all blocks; new blocks get places of their own."""
        for arena in self.arenas:
            arena.shared = True
        return Layout(
            self.sinks,
            self.block_size,
            self.residual,
            list(self.lengths),
            list(self.tails),
            [list(blocks) for blocks in self.table],
            list(self.arenas),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        """Returns :meth:`fork`, so that no place is given out twice."""
        return self.fork()
