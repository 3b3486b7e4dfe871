"""The Hugging Face cache whose layers hold packed blocks.

`KVQuantCache` is passed to a model as `past_key_values`; the attention modules installed by
:func:`kvquant.models.load_quantized_model` read and write it. Once per forward call the model tells
the cache which columns are tokens (`begin_forward`), so that padding is neither stored nor counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from kvquant.block_layer import BlockLayer
from kvquant.block_store import BlockStore
from kvquant.cache_interface import AttendingCache
from kvquant.continuation import Past, block_table, range_blocks
from kvquant.decode_step import StepTables
from kvquant.kernels.cuda_decode import DecodeStep
from kvquant.kernels.dispatch import use_cuda, use_triton_attention
from kvquant.layout import AppendPlan, Layout, View
from kvquant.outlier_watch import OutlierWatch, widen_codecs
from kvquant.padding import Padding
from kvquant.past_pieces import Piece, cut_past
from kvquant.rope import Rope
from kvquant.schemes.base import Codec

Protocol = Literal["A", "B"]

# Key elements of a layer that protocol B reads back at once (0.5 GB with the values, in 32 bits).
MOST_READ_BACK = 1 << 26


class KVQuantCache(Cache, AttendingCache):
    """A transformers cache of packed blocks.

    Args:
        codecs: One a layer.
        rope: Positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`.
        protocol: "A": the tokens of a call attend to each other in full precision and to the past
            from the cache (serving). "B": everything is read from the cache (KVQuant's perplexity).
        static_rope: Whether a position's rotation is the same however long the sequence; decode
            kernels need that.

    Attributes:
        layout: Where tokens are; shared by all layers.
        plan: What the layers do in the current call.
        timed: Synchronise around quantization so that `quantize_seconds` is right on a GPU.
        quantize_seconds: Time spent in quantize and pack since creation.
    """

    def __init__(
        self,
        codecs: list[Codec],
        rope: Rope,
        protocol: Protocol = "A",
        *,
        static_rope: bool = False,
    ) -> None:
        if protocol not in ("A", "B"):
            raise ValueError(f"protocol: must be 'A' or 'B', got {protocol!r}")
        shapes = {(c.sinks, c.block_size, c.residual) for c in codecs}
        if len(shapes) != 1:
            raise ValueError("codecs: all layers need the same sinks, block_size and residual")
        super().__init__(layers=[BlockLayer(codec, self) for codec in codecs])
        self.protocol = protocol
        self.layout = Layout(*shapes.pop())
        self.timed = False
        self.quantize_seconds = 0.0
        self.plan: AppendPlan
        self.query_positions: torch.Tensor
        self.new_positions: torch.Tensor | None = None
        self._rope = rope
        self._padding = Padding()
        self._pieces: list[Piece] | None = None
        # Of the current call's kernels; False: not asked yet. Block numbers outlive a call.
        self._past: Past | Literal[False] | None = False
        self._block_table: tuple[list[int], torch.Tensor | None] | None = None
        self._watch = OutlierWatch()
        self.static_rope = static_rope
        # Of a decode step that kernels take: None in other calls.
        self.steps: StepTables | None = None
        self.step: DecodeStep
        self.step_places: torch.Tensor
        self.captured = False  # a graph plans its calls itself (kvquant.graphed)
        self.query_heads = 0  # learnt from the first call
        self._broken = False  # layers hold their blocks in different places
        self._step_tables: StepTables | None = None

    def begin_forward(
        self, batch: int, new_len: int, mask: torch.Tensor | None, device: torch.device
    ) -> None:
        """Notes which columns of the coming call are tokens and plans where they go.

        Args:
            batch: Sequences.
            new_len: New columns.
            mask: `[batch_size, columns]` with 1 = token, 0 = padding, or None for no padding.
            device: Of the model.

        Raises:
            ValueError: The mask does not cover all columns.
        """
        if self._broken:
            raise RuntimeError("cache: choosing or cutting its sequences failed; reset() it")
        if self.captured:
            return
        self._watch.check()
        if self.layout.table and batch != len(self.layout.table):
            raise ValueError(
                f"input_ids: a batch of {batch}, but the cache holds {len(self.layout.table)}"
            )
        total = self.get_seq_length() + new_len
        spans = self._padding.spans(batch, new_len, total, mask)
        self._pieces, self._past = None, False
        self.query_positions, self.new_positions = self._padding.positions(
            batch, new_len, total, mask, device
        )
        before = self.layout.view()
        self.plan = self.layout.append(spans)
        if self.plan.arena >= 0:
            self._watch.note_packing()
        self._begin_step(before, device)

    def step_tables(self, device: torch.device) -> StepTables | None:
        """The tables of decode kernels, or None where the PyTorch path takes the steps."""
        store, codec = self.layers[0].store, self.layers[0].codec
        if not (self.static_rope and self.protocol == "A" and store.tail is not None):
            return None
        _, heads, _, dim = store.tail[0].shape
        shape = codec.decode_shape(dim, self.query_heads // heads, store.tail[0].dtype)
        if shape is None or not use_cuda(shape, device) or store.arena_table() is None:
            return None
        if self._step_tables is None or self._step_tables.shape != shape:
            self._step_tables = StepTables(shape, self._rope, device)
        return self._step_tables if self._step_tables.fits(self.layout) else None

    def _begin_step(self, before: View, device: torch.device) -> None:
        self.steps = None
        if not self.plan.decode or device.type != "cuda":
            return
        steps = self.step_tables(device)
        if steps is None:
            return
        steps.write(self.layout, before.blocks, before.tails)
        self.step_places = steps.take_places()
        steps.count_token()
        self.step, self.steps = steps.step(), steps

    def count_step(self, steps: StepTables) -> None:
        """After a replayed step: the host's side of it, and packing of the tails that it filled."""
        self._watch.check()
        batch = len(self.layout.table)
        self.plan = self.layout.append([slice(0, 1)] * batch)
        if self.plan.arena >= 0:
            self._watch.note_packing()
        steps.count_token()
        for layer in self.layers:
            layer.columns += 1
            layer.store.pack_full(self.plan)
        self._padding.count_token()

    def pieces(self, queries: torch.Size) -> list[Piece]:
        """The past that the current call reads, cut so that a piece's scores stay small.

        Args:
            queries: Shape of the queries, `(batch_size, num_heads, q_len, head_dim)`.
        """
        if self._pieces is None:
            simulated = self.protocol == "B"
            view = self.plan.after if simulated else self.plan.before
            # A step's queries see all that came before; others need their positions compared.
            causal = simulated and queries[2] > 1
            device = self.query_positions.device
            self._pieces = cut_past(self.layout, view, self._rope, queries, device, causal=causal)
        return self._pieces

    def token_positions(self) -> torch.Tensor | None:
        """`new_positions`, or None where all of the call's columns are tokens."""
        columns = slice(0, self.query_positions.shape[1])
        whole = all(isinstance(s, slice) and s == columns for s in self.plan.spans)
        return None if whole else self.new_positions

    def starts_whole(self, keys: torch.Tensor) -> bool:
        """Whether the current call is the first, has no padding and is small enough to be read
        back at once; its keys are `[batch_size, num_kv_heads, new_len, head_dim]`."""
        first = not any(self.plan.before.lengths) and self.token_positions() is None
        return first and keys.numel() <= MOST_READ_BACK

    def past(self, queries: torch.Tensor) -> Past | None:
        """What the Triton kernels need to attend to the past, or None where they do not apply.

        Args:
            queries: Of the current call, `[batch_size, num_heads, q_len, head_dim]`.
        """
        if self._past is False:
            self._past = self._find_past(queries)
        return self._past

    def _find_past(self, queries: torch.Tensor) -> Past | None:
        store, codec = self.layers[0].store, self.layers[0].codec
        if store.tail is None or codec.rotated_keys:
            return None
        _, heads, _, dim = store.tail[0].shape
        shape = codec.decode_shape(dim, self.query_heads // heads, store.tail[0].dtype)
        if shape is None or not use_triton_attention(shape, queries):
            return None
        simulated = self.protocol == "B"
        view = self.plan.after if simulated else self.plan.before
        if self._block_table is None or self._block_table[0] != view.blocks:
            table = block_table(self.layout, view.blocks, queries.device)
            self._block_table = (list(view.blocks), table)
        numbers = self._block_table[1]
        if numbers is None:
            return None
        step = range_blocks(queries.shape[0] * heads, shape, queries.element_size())
        return Past.make(
            shape, self.layout, view, numbers, self._rope, step, causal=simulated
        )  # fmt: skip

    def settle(self) -> None:
        """Waits for the device and raises if what it packed so far is not whole.

        Raises:
            OutlierOverflow: Outliers were lost for want of room.
            ValueError: The input held NaN or Inf.
        """
        self._watch.settle()

    def widen(self) -> None:
        """Gives the next caches of these codecs the room for outliers that this one lacked."""
        widen_codecs(layer.store for layer in self.layers)

    def status(self, device: torch.device) -> torch.Tensor | None:
        """See :meth:`OutlierWatch.status`."""
        return self._watch.status(device)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return list(self.layout.lengths)

    def reset(self) -> None:
        """Forgets everything."""
        old = self.layout
        self.layout = Layout(old.sinks, old.block_size, old.residual)
        self._pieces = self._step_tables = None
        self._padding, self._watch = Padding(), OutlierWatch()
        self._past, self._block_table = False, None
        self._broken = False
        for layer in self.layers:
            layer.columns = 0
            layer.store = BlockStore(layer.codec)

    def _select(self, indices: torch.Tensor) -> None:
        if not self.layout.table:
            return
        order, before = indices.tolist(), len(self.layout.table)
        if not order:
            raise ValueError("indices: no sequence is kept; empty the cache by reset()")
        if not all(-before <= i < before for i in order):
            raise ValueError(f"indices: {order}, but the cache holds {before} sequences")
        with self._changing():
            self.layout.select(order)
            self._forget_tables()
            self._padding.select(indices)
            for layer in self.layers:
                layer.store.select(indices)
            if len(set(order)) < before:
                self._reclaim()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Refuses further calls if what follows ends in an error, as for want of memory."""
        self._broken = True
        yield
        self._broken = False

    def _reclaim(self) -> None:
        """Returns the memory of blocks that no sequence has any more."""
        change = self.layout.reclaim()
        if change is not None:
            for layer in self.layers:
                layer.store.reclaim(change)

    def _forget_tables(self) -> None:
        self._block_table = None
        if self._step_tables is not None:
            self._step_tables.forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences for beam search; packed blocks are shared, not moved."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences (int64 indices or a bool mask)."""
        self._select(indices.nonzero().view(-1) if indices.dtype is torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence; its blocks are shared."""
        self._select(torch.arange(len(self.layout.table)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Drops columns from the end.

        Tokens in 16 bits are cut exactly. Where the cut falls into a packed block, its remaining
        tokens go back to the 16-bit tail with their quantized values.

        Args:
            tokens_to_remove: Negative or 0: minus the columns to drop, as transformers' newest
                release counts. Positive: the columns to keep, as its older ones do.
        """
        columns = self.get_seq_length()
        keep = columns + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if keep >= columns:
            return
        if keep <= 0:
            self.reset()
            return
        lengths = self._padding.crop(keep) or [keep] * len(self.layout.table)
        with self._changing():
            cuts = self.layout.crop(lengths)
            self._forget_tables()
            for layer in self.layers:
                layer.store.uncut(cuts)
                layer.columns = keep
            self._reclaim()

    def copy(self) -> KVQuantCache:
        """A cache that goes on from here, to reuse a prompt; packed blocks are shared."""
        codecs = [layer.codec for layer in self.layers]
        other = KVQuantCache(codecs, self._rope, self.protocol, static_rope=self.static_rope)
        other.layout = self.layout.fork()
        other._padding = self._padding.fork()
        other._watch = self._watch.fork()
        other.query_heads = self.query_heads
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.columns = mine.columns
            theirs.store = mine.store.fork()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> KVQuantCache:
        """See :meth:`copy`."""
        return self.copy()
