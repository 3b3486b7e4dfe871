"""An arena is the memory for many packed blocks of one layer, in tensors that never move.

Blocks fill the places of an arena in order and are read from there. Kernels read the addresses of
its tensors from a table with one row per arena.
"""

from __future__ import annotations

import torch

from kvquant.cache.codec import Packed
from kvquant.formats.blocked_sparse import Index, SparseArena, SparseSlab
from kvquant.kernels.arena_table import OUTLIER_FIELDS

# Tensors whose addresses the kernels read, in the order of `arena_table.ARENA_FIELDS`.
DENSE, SPARSE = ("keys", "values", "zero", "scale"), ("keys", "values")


class Arena:
    """Memory for a fixed number of packed blocks of one layer.

    Args:
        capacity: Number of blocks that the arena holds.
        first: The first blocks that will be stored, which give shapes and dtypes, or the memory of
            all blocks, reserved by the codec.
    """

    def __init__(self, capacity: int, first: Packed) -> None:
        self.reserved = first.reserved
        # Blocks that fill the arena are kept as they are, not copied.
        self._adopted = first if first.blocks == capacity else None
        self.dense = {
            name: t if self._adopted else t.new_empty((capacity, *t.shape[1:]))
            for name, t in first.dense.items()
        }
        self.sparse = {name: SparseArena(capacity, slab) for name, slab in first.sparse.items()}

    def put(self, at: int, packed: Packed) -> None:
        """Stores blocks from place `at` on."""
        if packed is self._adopted:
            return
        for name, t in packed.dense.items():
            self.dense[name][at : at + t.shape[0]] = t
        for name, slab in packed.sparse.items():
            self.sparse[name].put(at, slab)

    def view(self, blocks: Index) -> Packed:
        """Returns the given blocks; a slice copies nothing."""
        return Packed(
            {name: t[blocks] for name, t in self.dense.items()},
            {name: s.view(blocks) for name, s in self.sparse.items()},
        )

    def rewind(self, used: int) -> None:
        """Forgets what was put at place `used` or later."""
        for sparse in self.sparse.values():
            sparse.rewind(used)

    @classmethod
    def gather(cls, sources: list[tuple[Arena, list[int]]]) -> Arena:
        """Copies blocks into a new arena that they fill; outliers make it wait for the device."""
        first = sources[0][0]
        device = next(iter(first.dense.values())).device
        blocks = sum(len(places) for _, places in sources)
        dense = {name: t.new_empty((blocks, *t.shape[1:])) for name, t in first.dense.items()}
        slabs: dict[str, list[SparseSlab]] = {name: [] for name in first.sparse}
        at = 0
        for arena, places in sources:
            chosen = torch.tensor(places).to(device, non_blocking=True)
            for name, t in dense.items():
                t[at : at + len(places)] = arena.dense[name][chosen]
            for name, found in slabs.items():
                found.append(arena.sparse[name].view(chosen))
            at += len(places)
        sparse = {name: SparseSlab.gather(found) for name, found in slabs.items()}
        return cls(blocks, Packed(dense, sparse, reserved=first.reserved))

    @property
    def addresses(self) -> list[int]:
        """The row of the kernels' table of arenas for this arena, which must be reserved."""
        row = [self.dense[name].data_ptr() if self.dense else 0 for name in DENSE]
        none = [0] * len(OUTLIER_FIELDS)
        for name in SPARSE:
            row += self.sparse[name].addresses if name in self.sparse else none
        return row

    @property
    def nbytes(self) -> int:
        """The bytes that the arena has allocated."""
        dense = sum(t.nbytes for t in self.dense.values())
        return dense + sum(s.nbytes for s in self.sparse.values())


# Stands in for an arena that was freed, until another arena takes its number.
NO_ARENA = Arena(0, Packed({}, {}, reserved=True))
