"""Computes attention over a packed past by the Triton kernels, for chunks and later turns.

The past is expanded range by range into a workspace of bounded size. Attention reads each range on
tensor cores before the next one overwrites it. What the layers of a call share is decided once per
call (:class:`Past`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvquant.cache.layout import Layout, View
from kvquant.kernels.arena_table import block_numbers
from kvquant.kernels.cuda_decode import DecodeShape

if TYPE_CHECKING:
    from kvquant.cache.block_store import BlockStore
    from kvquant.kernels.backends import Backend
    from kvquant.kernels.triton_workspace import Range

# Limits of the workspace: tokens per sequence, bytes of all sequences, and the tokens per sequence
# that are worth a launch even if they take more bytes.
MAX_TOKENS, MAX_BYTES, MIN_TOKENS = 16384, 1 << 29, 256


def block_table(layout: Layout, blocks: list[int], device: torch.device) -> torch.Tensor:
    """Returns the block numbers of the sequences, int32 `[batch_size, max blocks]`."""
    return block_numbers(layout.table, blocks).to(device, non_blocking=True)


def range_blocks(sequences_heads: int, shape: DecodeShape, itemsize: int) -> int:
    """Returns how many blocks of each sequence are expanded at a time.

    Args:
        sequences_heads: Number of sequences times number of key heads.
        shape: The constants that the kernels are compiled for.
        itemsize: Bytes of an element of the workspace.
    """
    token = 2 * sequences_heads * shape.head_dim * itemsize
    tokens = min(MAX_TOKENS, max(MIN_TOKENS, MAX_BYTES // token))
    return max(1, tokens // shape.block_size)


@dataclass(frozen=True)
class Past:
    """The past that a call reads, the same for all layers.

    Attributes:
        shape: The constants that the kernels are compiled for.
        view: The state of the cache.
        table: The block numbers; see :func:`block_table`.
        lengths: int32 `[batch_size, 4]`: sinks held, blocks, tokens in the tail, their sum.
        rope: fp32 cosine and sine `[longest, head_dim / 2]`.
        sinks: Number of sinks of a sequence that is long enough.
        step: Number of blocks expanded at a time.
        causal: Whether a query sees only what is at its position or before (protocol B).
    """

    shape: DecodeShape
    view: View
    table: torch.Tensor
    lengths: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    sinks: int
    step: int
    causal: bool

    @classmethod
    def make(
        cls,
        shape: DecodeShape,
        layout: Layout,
        view: View,
        table: torch.Tensor,
        rope: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        step: int,
        *,
        causal: bool,
    ) -> Past:
        """Makes the tensors that the kernels read.

        Args:
            shape: The constants that the kernels are compiled for.
            layout: Layout of the cache.
            view: The state that is read.
            table: The block numbers; see :func:`block_table`.
            rope: Rotation of the model.
            step: Number of blocks expanded at a time.
            causal: See :class:`Past`.
        """
        device = table.device
        rows = [
            (min(layout.sinks, length), blocks, tail, length)
            for length, blocks, tail in zip(view.lengths, view.blocks, view.tails, strict=True)
        ]
        lengths = torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)
        both = rope(torch.arange(max(view.lengths), device=device)[None])
        half = shape.head_dim // 2
        cos, sin = (x[0, :, :half].float().contiguous() for x in both)
        return cls(shape, view, table, lengths, (cos, sin), layout.sinks, step, causal)

    @functools.cached_property
    def unrotated(self) -> Past:
        """The same past for layers without RoPE, whose keys are read as they are."""
        cos, sin = self.rope
        return replace(self, rope=(torch.ones_like(cos), torch.zeros_like(sin)))

    def attend(
        self,
        store: BlockStore,
        queries: torch.Tensor,
        positions: torch.Tensor,
        scaling: float,
        own: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the attention of a layer's queries.

        Args:
            store: The layer's tensors.
            queries: Rotated queries, `[batch_size, num_heads, q_len, head_dim]`.
            positions: int64 `[batch_size, q_len]`, positions of the queries.
            scaling: Factor of the scores.
            own: Rotated keys, values and positions of the call's tokens, which attend to each other
                in full precision under protocol A; None under protocol B. The positions are None
                where all columns are tokens.
            sink_logits: `[num_heads]`, a logit of each query head that takes its share of the
                softmax and has no value; None: there is none.

        Returns:
            `[batch_size, q_len, num_heads, head_dim]`.
        """
        from kvquant.kernels.triton_attention import RunningAttention

        assert store.tail is not None
        heads = store.tail[0].shape[1]
        parts, places = self._parts()
        attention = RunningAttention(
            queries, positions, heads, scaling, parts + (own is not None), places,
            soft_cap=self.shape.soft_cap, sink_logits=sink_logits,
        )  # fmt: skip
        order = store.codec.key_order
        for part, data in self._expanded(store, queries.dtype):
            attention.add_past(
                data, part.base, part.places, self.lengths, causal=self.causal, order=order
            )
        if own is not None:
            attention.add_own(*own)
        return attention.result()

    def attend_in_8_bits(
        self,
        store: BlockStore,
        queries: torch.Tensor,
        positions: torch.Tensor,
        scaling: float,
        own: tuple[torch.Tensor, torch.Tensor] | None,
        tokens: torch.Tensor | None,
        backend: Backend,
    ) -> torch.Tensor:
        """Computes the attention of a layer's queries with 8-bit products.

        Args:
            store: The layer's tensors.
            queries: Rotated queries, `[batch_size, num_heads, q_len, head_dim]`.
            positions: int64 `[batch_size, q_len]`, positions of the queries.
            scaling: Factor of the scores.
            own: Rotated keys and values of the call's tokens under protocol A; None under B.
            tokens: int64 `[batch_size, q_len]`, negative where a column is no token; None: all are.
            backend: The one that attends.

        Returns:
            `[batch_size, q_len, num_heads, head_dim]`.
        """
        from kvquant.kernels.prompt_parts import PromptParts, token_columns

        assert store.tail is not None
        valid = None if tokens is None else tokens >= 0
        columns = None if valid is None else token_columns(valid)
        asked = torch.full_like(self.lengths[:, 3], queries.shape[2])
        first = positions[:, 0]
        if valid is not None and columns is not None:
            asked = valid.sum(1, dtype=torch.int32)
            first = positions.take_along_dim(columns[:, :1].long(), 1)[:, 0]
        parts = self._parts()[0] + (own is not None)
        heads = store.tail[0].shape[1]
        attention = PromptParts(queries, heads, scaling, parts, backend, columns=columns)
        for part, data in self._expanded(store, queries.dtype):
            there = (self.lengths[:, 3] - part.base).clamp(0, part.places)
            before = (first - part.base).int() if self.causal else there
            attention.add(
                data[0], data[1], torch.stack((asked, there, before), 1),
                order=store.codec.key_order,
            )  # fmt: skip
        if own is not None:
            counts = torch.stack((asked, asked, torch.zeros_like(asked)), 1)
            attention.add(*own, counts, columns=columns)
        return attention.result()

    def expand(self, store: BlockStore, dtype: torch.dtype) -> None:
        """Expands all ranges without attention, so that benchmarks can measure the cost."""
        for _ in self._expanded(store, dtype):
            pass

    def _total(self) -> int:
        # A tail is a block that is not full. Without a block or a tail, sinks still need a range.
        ends = [n + (t > 0) for n, t in zip(self.view.blocks, self.view.tails, strict=True)]
        return max(1, *ends)

    def _parts(self) -> tuple[int, int]:
        """Returns the number of ranges and the places of the longest one."""
        step = min(self.step, self._total())
        return -(-self._total() // step), self.sinks + step * self.shape.block_size

    def _expanded(
        self, store: BlockStore, dtype: torch.dtype
    ) -> Iterator[tuple[Range, torch.Tensor]]:
        """Yields each range with its rotated keys and values, which the next one overwrites."""
        from kvquant.kernels.triton_workspace import Held, Range, Workspace

        arenas, tables = store.arena_table(), store.codec.past_tables
        assert store.sinks is not None and store.tail is not None
        assert arenas is not None and tables is not None
        batch, heads = store.tail[0].shape[:2]
        tail = store.tail
        if self.causal and max(self.view.tails):
            faked = store.read_tail(self.view, fake=True)
            tail = (faked[0].contiguous(), faked[1].contiguous())
        held = Held(store.sinks, tail)
        size, total, places = self.shape.block_size, self._total(), self._parts()[1]
        workspace = Workspace(self.shape, batch, heads, places, dtype, arenas.device)
        step = min(self.step, total)
        for first in range(0, total, step):
            stop = min(first + step, total)
            base = self.sinks + first * size if first else 0
            part = Range(first, stop, base, self.sinks + stop * size - base)
            workspace.expand(
                part, arenas, self.table, self.lengths, held, tables, self.rope, self.sinks
            )
            yield part, workspace.data
