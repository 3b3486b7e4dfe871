"""One layer's storage: 16-bit sinks, packed blocks, a 16-bit tail; for a ragged batch.

A sequence of `n` tokens is held as: its first `sinks` tokens, then as many full blocks as are older
than the last `residual` tokens, then a tail of `residual` to `residual + block_size - 1` tokens (or
fewer while the sequence is short). That state depends on the sequence alone, not on the batch or on
the chunks in which it came. An append packs the blocks that became full into a new slab; nothing
stored is copied or moved, and padding never gets here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvquant.schemes.base import Codec


@dataclass
class Run:
    """Consecutive blocks of one sequence inside a slab."""

    sequence: int
    first_token: int
    first_block: int
    blocks: int


@dataclass
class Slab:
    """Blocks packed by one append, of all sequences."""

    packed: Any
    blocks: int
    runs: list[Run]


class BlockStore:
    """Keys and values of one layer.

    Args:
        codec: Packs and unpacks blocks.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.lengths: list[int] = []
        self.slabs: list[Slab] = []
        self._tail_lengths: list[int] = []
        self._sinks: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tail: tuple[torch.Tensor, torch.Tensor] | None = None

    def _allocate(self, keys: torch.Tensor) -> None:
        batch, heads, _, dim = keys.shape
        kind = keys.dtype if keys.dtype is torch.bfloat16 else torch.float16

        def buffer(tokens: int) -> torch.Tensor:
            return torch.zeros((batch, heads, tokens, dim), dtype=kind, device=keys.device)

        tail = self.codec.residual + self.codec.block_size
        self._sinks = (buffer(self.codec.sinks), buffer(self.codec.sinks))
        self._tail = (buffer(tail), buffer(tail))
        self.lengths = [0] * batch
        self._tail_lengths = [0] * batch

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, spans: list[slice | torch.Tensor]
    ) -> None:
        """Appends tokens.

        Args:
            keys: `[batch_size, num_kv_heads, new_len, head_dim]`, padding included; before or after
                RoPE as the codec says.
            values: The same shape.
            spans: For each sequence, which of the `new_len` columns are tokens.
        """
        if self._tail is None:
            self._allocate(keys)
        assert self._tail is not None and self._sinks is not None
        kind = self._tail[0].dtype
        keys, values = keys.to(kind), values.to(kind)
        size, sinks = self.codec.block_size, self.codec.sinks
        full: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        runs: list[Run] = []
        packed_blocks = 0
        for b, span in enumerate(spans):
            new = (keys[b][:, span], values[b][:, span])
            count = new[0].shape[1]
            if count == 0:
                continue
            length, tail = self.lengths[b], self._tail_lengths[b]
            to_sinks = min(max(sinks - length, 0), count)
            if to_sinks:
                for buffer, x in zip(self._sinks, new, strict=True):
                    buffer[b, :, length : length + to_sinks] = x[:, :to_sinks]
                new = (new[0][:, to_sinks:], new[1][:, to_sinks:])
            total = tail + count - to_sinks
            blocks = max(0, (total - self.codec.residual) // size)
            self.lengths[b] = length + count
            self._tail_lengths[b] = total - blocks * size
            if blocks == 0:
                for buffer, x in zip(self._tail, new, strict=True):
                    buffer[b, :, tail:total] = x
                continue
            for buffer, x, out in zip(self._tail, new, full, strict=True):
                # bounded by one tail and the appended tokens: nothing stored is copied
                joined = torch.cat([buffer[b, :, :tail], x], 1) if tail else x
                out.append(joined[:, : blocks * size].unflatten(1, (blocks, size)).transpose(0, 1))
                buffer[b, :, : total - blocks * size] = joined[:, blocks * size :]
            runs.append(Run(b, length + to_sinks - tail, packed_blocks, blocks))
            packed_blocks += blocks
        if runs:
            packed = self.codec.pack(torch.cat(full[0]), torch.cat(full[1]))
            self.slabs.append(Slab(packed, packed_blocks, runs))

    def read(self, keys: torch.Tensor, values: torch.Tensor, *, fake_tail: bool) -> None:
        """Writes all tokens, compacted (token `i` of a sequence at index `i`), into buffers.

        Args:
            keys: `[batch_size, num_kv_heads, >= max(lengths), head_dim]`, written in place.
            values: The same shape.
            fake_tail: Quantize and dequantize the tail too (protocol B).
        """
        if self._tail is None or self._sinks is None:
            return
        heads, dim = keys.shape[1], keys.shape[3]
        size = self.codec.block_size
        for slab in self.slabs:
            both = self.codec.unpack(slab.packed, (slab.blocks, heads, size, dim))
            for run in slab.runs:
                stop = run.first_token + run.blocks * size
                for out, x in zip((keys, values), both, strict=True):
                    part = x[run.first_block : run.first_block + run.blocks]
                    view = out[run.sequence, :, run.first_token : stop]
                    view.unflatten(1, (run.blocks, size)).copy_(part.transpose(0, 1))
        for b, (length, tail) in enumerate(zip(self.lengths, self._tail_lengths, strict=True)):
            sinks = min(self.codec.sinks, length)
            recent = (self._tail[0][b : b + 1, :, :tail], self._tail[1][b : b + 1, :, :tail])
            if fake_tail and tail:
                recent = self.codec.fake(*recent)
            for out, sink, x in zip((keys, values), self._sinks, recent, strict=True):
                out[b, :, :sinks] = sink[b, :, :sinks]
                out[b, :, length - tail : length] = x[0]

    def select(self, indices: torch.Tensor) -> None:
        """Keeps (or repeats) the given sequences, int64 `[new_batch]`: beams, batch selection."""
        if self._tail is None or self._sinks is None:
            return
        order = [int(i) for i in indices.tolist()]
        where = indices.to(self._tail[0].device)
        self._sinks = (self._sinks[0][where], self._sinks[1][where])
        self._tail = (self._tail[0][where], self._tail[1][where])
        self.lengths = [self.lengths[i] for i in order]
        self._tail_lengths = [self._tail_lengths[i] for i in order]
        slabs = []
        for slab in self.slabs:
            runs: list[Run] = []
            blocks: list[int] = []
            for b, old in enumerate(order):
                for run in slab.runs:
                    if run.sequence == old:
                        runs.append(Run(b, run.first_token, len(blocks), run.blocks))
                        blocks += range(run.first_block, run.first_block + run.blocks)
            if runs:
                wanted = torch.tensor(blocks, dtype=torch.int64, device=where.device)
                slabs.append(Slab(slab.packed.select(wanted), len(blocks), runs))
        self.slabs = slabs

    @property
    def nbytes(self) -> int:
        """Bytes allocated: sinks, tails with their slack, packed blocks, shared tables."""
        if self._tail is None or self._sinks is None:
            return 0
        buffers = sum(t.nbytes for t in (*self._sinks, *self._tail))
        return buffers + sum(s.packed.nbytes for s in self.slabs) + self.codec.shared_bytes

    @property
    def elements(self) -> int:
        """Key and value elements of all tokens (padding does not count)."""
        if self._tail is None:
            return 0
        _, heads, _, dim = self._tail[0].shape
        return 2 * heads * dim * sum(self.lengths)
