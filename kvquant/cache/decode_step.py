"""Tables on the GPU that the attention kernel reads, shared by all layers of a decode step.

The host writes them only when blocks are added. In between, the device advances them, so that a
step needs no host data and can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from kvquant.cache.layout import Layout, View
from kvquant.formats.rope import Rope
from kvquant.kernels.arena_table import block_numbers
from kvquant.kernels.cuda_decode import DecodeShape, DecodeStep
from kvquant.kernels.decode_tables import RopeTables


class StepTables:
    """The block table, lengths and rotary tables of a cache on its device.

    Args:
        shape: The constants that the kernel is compiled for.
        rope: Rotation of the model; must not depend on the length of the sequence.
        device: Device of the cache.
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

    @torch.inference_mode(False)  # steps outside inference mode write to these tensors, too
    def reserve(self, layout: Layout, blocks: int) -> None:
        """Makes room for `blocks` blocks per sequence; replaces tensors that are too small."""
        batch = len(layout.table)
        chunks = blocks * (self.shape.block_size // self.shape.chunk)
        if self._table.shape[0] != batch or self._table.shape[1] < blocks:
            self._table = torch.zeros((batch, blocks), dtype=torch.int32, device=self._device)
            self._lengths = torch.zeros((batch, 3), dtype=torch.int32, device=self._device)
            self._layout = None
        if self._tables is None or self._chunks < chunks:
            self._tables = RopeTables.make(
                self._rope,
                self.shape.chunk,
                layout.sinks,
                chunks,
                self._table,
                allocated=self.shape.allocated,
            )
            self._chunks = chunks

    def write(self, layout: Layout, blocks: list[int], tails: list[int]) -> None:
        """Updates the tables to a layout.

        Args:
            layout: Layout of the cache.
            blocks: Number of blocks of each sequence.
            tails: Number of tokens in each tail.
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
        """Invalidates the tables after the layout changed in place (beam search, crop)."""
        self._layout = None

    def take_places(self) -> torch.Tensor:
        """Takes the next place in each tail, int64 `[batch_size]`, and advances the lengths.

        Only the device counts the token; :meth:`count_token` does so on the host.
        """
        places = self._lengths[:, 2].long()
        self._lengths[:, 2] += 1
        return places

    def take_step(self, layout: Layout, before: View) -> torch.Tensor:
        """Updates the tables for a step and takes its places, on the device and on the host."""
        self.write(layout, before.blocks, before.tails)
        places = self.take_places()
        self.count_token()
        return places

    def count_token(self) -> None:
        """Counts on the host the token that :meth:`take_places` counted on the device."""
        self._tails = [n + 1 for n in self._tails]

    @property
    def lengths(self) -> torch.Tensor:
        """The lengths, int32 `[batch_size, 3]`, as :class:`DecodeStep` describes them."""
        return self._lengths

    def addresses(self) -> tuple[int, ...]:
        """Returns the addresses of the tensors that a captured graph reads."""
        assert self._tables is not None
        kept = (self._table, self._lengths, self._tables.places, self._tables.phases)
        return tuple(t.data_ptr() for t in kept)

    def step(self, *, whole: bool = False) -> DecodeStep:
        """Returns the arguments with which the kernel is launched.

        Args:
            whole: Whether to split for the room in the tables instead of the existing blocks, as a
                captured graph needs.
        """
        assert self._tables is not None
        per_block = self.shape.block_size // self.shape.chunk
        blocks = self._table.shape[1] if whole else max(self._blocks)
        return DecodeStep(self._table, self._lengths, blocks * per_block, self._tables)


class KernelSteps:
    """Keeps the tables of a cache's decode steps on each device from one step to the next."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, StepTables] = {}

    def tables(self, shape: DecodeShape, rope: Rope, device: torch.device) -> StepTables:
        """Returns the tables of a cache, made anew where the kernel's constants changed.

        Args:
            shape: The constants that the kernel is compiled for.
            rope: Rotation of the model; does not depend on the length of the sequence.
            device: Device of the layers.
        """
        found = self._tables.get(device)
        if found is None or found.shape != shape:
            found = self._tables[device] = StepTables(shape, rope, device)
        return found

    def forget(self) -> None:
        """Invalidates the tables, if there are any; see :meth:`StepTables.forget`."""
        for tables in self._tables.values():
            tables.forget()
