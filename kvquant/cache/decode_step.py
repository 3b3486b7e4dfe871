"""What the layers of a decode step share on a GPU: tables that the attention kernel reads.

They are written where blocks appear and advance by themselves in between, so that a step needs no
host data and can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from kvquant.cache.layout import Layout, View
from kvquant.formats.rope import Rope
from kvquant.kernels.arena_table import block_numbers
from kvquant.kernels.cuda_decode import DecodeShape, DecodeStep
from kvquant.kernels.decode_tables import RopeTables


class StepTables:
    """Block table, lengths and rotary tables of a cache.

    Args:
        shape: What the kernel is compiled for.
        rope: Of the model; must not depend on the length of the sequence.
        device: Where.
    """

    def __init__(self, shape: DecodeShape, rope: Rope, device: torch.device) -> None:
        self.shape = shape
        self._rope = rope
        self._device = device
        self._layout: Layout | None = None
        self._blocks: list[int] = []
        self._tails: list[int] = []
        self._table = torch.empty(0, dtype=torch.int32, device=device)
        self._lengths = torch.empty(0, dtype=torch.int32, device=device)
        self._tables: RopeTables | None = None
        self._chunks = 0

    def reserve(self, layout: Layout, blocks: int) -> None:
        """Makes room for sequences of so many blocks; tensors are replaced if it was too small."""
        batch = len(layout.table)
        chunks = blocks * (self.shape.block_size // self.shape.chunk)
        if self._table.shape[0] != batch or self._table.shape[1] < blocks:
            self._table = torch.zeros((batch, blocks), dtype=torch.int32, device=self._device)
            self._lengths = torch.zeros((batch, 3), dtype=torch.int32, device=self._device)
            self._layout = None
        if self._tables is None or self._chunks < chunks:
            self._tables = RopeTables.make(
                self._rope, self.shape.chunk, layout.sinks, chunks, self._table
            )
            self._chunks = chunks

    def write(self, layout: Layout, blocks: list[int], tails: list[int]) -> None:
        """Brings the tables in line with a layout.

        Args:
            layout: Of the cache.
            blocks: Blocks of each sequence.
            tails: Tokens in each tail.
        """
        if self._layout is layout and blocks == self._blocks and tails == self._tails:
            return
        longest = max(blocks)
        if self._table.shape[0] != len(blocks) or self._table.shape[1] < longest:
            self.reserve(layout, longest + longest // 8 + 8)
        if (self._layout is not layout or blocks != self._blocks) and longest:
            new = block_numbers(layout.table, blocks)
            self._table[:, :longest].copy_(new, non_blocking=True)
        sinks = [min(layout.sinks, n) for n in layout.lengths]
        lengths = torch.tensor(list(zip(sinks, blocks, tails, strict=True)), dtype=torch.int32)
        self._lengths.copy_(lengths, non_blocking=True)
        self._layout, self._blocks, self._tails = layout, list(blocks), list(tails)

    def forget(self) -> None:
        """The layout's tables were changed in place (beams, crop): all is written anew."""
        self._layout = None

    def take_places(self) -> torch.Tensor:
        """Where the next token goes in each tail, int64 `[batch_size]`; the tails then hold it.

        Only the device learns of it: see :meth:`count_token`.
        """
        places = self._lengths[:, 2].long()
        self._lengths[:, 2] += 1
        return places

    def take_step(self, layout: Layout, before: View) -> torch.Tensor:
        """:meth:`write`, :meth:`take_places` and :meth:`count_token` of a call, from its plan."""
        self.write(layout, before.blocks, before.tails)
        places = self.take_places()
        self.count_token()
        return places

    def count_token(self) -> None:
        """The host's side of :meth:`take_places`."""
        self._tails = [n + 1 for n in self._tails]

    @property
    def lengths(self) -> torch.Tensor:
        """int32 `[batch_size, 3]`: see :class:`DecodeStep`."""
        return self._lengths

    def addresses(self) -> tuple[int, ...]:
        """Of the tensors that a captured graph reads."""
        assert self._tables is not None
        kept = (self._table, self._lengths, self._tables.places, self._tables.phases)
        return tuple(t.data_ptr() for t in kept)

    def step(self, *, whole: bool = False) -> DecodeStep:
        """What the kernel is launched with.

        Args:
            whole: Split for the room there is, not for the blocks there are (a captured graph).
        """
        assert self._tables is not None
        per_block = self.shape.block_size // self.shape.chunk
        blocks = self._table.shape[1] if whole else max(self._blocks)
        return DecodeStep(self._table, self._lengths, blocks * per_block, self._tables)


class KernelSteps:
    """The decode steps of a cache that kernels take; their tables outlive a step."""

    def __init__(self) -> None:
        self._tables: StepTables | None = None

    def tables(self, shape: DecodeShape, rope: Rope, device: torch.device) -> StepTables:
        """The tables of a cache whose steps the kernel takes.

        Args:
            shape: The constants that the kernel is compiled for.
            rope: Rotation of the model; does not depend on the length of the sequence.
            device: Device of the cache.
        """
        if self._tables is None or self._tables.shape != shape:
            self._tables = StepTables(shape, rope, device)
        return self._tables

    def forget(self) -> None:
        """See :meth:`StepTables.forget`."""
        if self._tables is not None:
            self._tables.forget()
