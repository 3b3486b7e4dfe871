"""The Hugging Face cache whose layers hold packed blocks.

`KVQuantCache` is passed to a model as `past_key_values`; the attention modules installed by
`load_quantized_model` read and write it. Once per forward call the model tells the cache
which columns are tokens (`begin_forward`), so that padding is neither stored nor counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from kvquant.cache.block_layer import BlockLayer
from kvquant.cache.block_store import BlockStore
from kvquant.cache.call_rope import CallRope
from kvquant.cache.codec import Codec
from kvquant.cache.decode_step import KernelSteps, StepTables
from kvquant.cache.forward_call import CallRecord, ForwardCall
from kvquant.cache.interface import AttendingCache, sequence_indices
from kvquant.cache.late_check import LateCheck
from kvquant.cache.layout import AppendPlan, Layout, Snapshot, View
from kvquant.cache.outlier_watch import OutlierWatch, widen_codecs
from kvquant.cache.packed_past import Past
from kvquant.cache.padding import Padding
from kvquant.cache.past_pieces import Piece
from kvquant.cache.past_reader import PastReader
from kvquant.cache.positions import check_batch
from kvquant.errors import UserError
from kvquant.formats.rope import Rope
from kvquant.kernels.cuda_decode import DecodeStep

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
        keep_rope: Keep the rotation of each token as it came, because that of a position changes
            from call to call (dynamic scaling).

    Attributes:
        columns: Seen so far in whole calls, padding included.
        calls: Which call runs, and whether one ended early.
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
        keep_rope: bool = False,
    ) -> None:
        if protocol not in ("A", "B"):
            raise ValueError(f"protocol: must be 'A' or 'B', got {protocol!r}")
        shapes = {(c.sinks, c.block_size, c.residual) for c in codecs}
        if len(shapes) != 1:
            raise ValueError("codecs: all layers need the same sinks, block_size and residual")
        super().__init__(layers=[BlockLayer(codec, self, i) for i, codec in enumerate(codecs)])
        self.columns = 0
        self.calls = CallRecord()
        self.protocol = protocol
        self.layout = Layout(*shapes.pop())
        self.timed = False
        self.quantize_seconds = 0.0
        self.plan: AppendPlan
        self._before = self.layout.view()  # before the current call
        self.query_positions: torch.Tensor
        self.new_positions: torch.Tensor | None = None
        self._rope = CallRope(rope, keep=keep_rope, rotated=codecs[0].rotated_keys)
        self._padding = Padding()
        self._reader = PastReader(simulated=protocol == "B")
        self._watch, self._late = OutlierWatch(), LateCheck()
        self.static_rope = static_rope
        # Of a decode step that kernels take: None in other calls.
        self.steps: StepTables | None = None
        self.step: DecodeStep
        self.step_places: torch.Tensor
        self.captured = False  # a graph plans its calls itself (kvquant.models.graph_decoding)
        self.query_heads = 0  # learnt from the first call
        self._kernels = KernelSteps()

    def begin_forward(
        self,
        batch: int,
        new_len: int,
        mask: torch.Tensor | None,
        device: torch.device,
        positions: torch.Tensor | None = None,
        *,
        given: bool = True,
        held: bool = False,
    ) -> None:
        """See :meth:`AttendingCache.begin_forward`; plans where the new tokens go.

        Raises:
            ValueError: The mask does not cover all columns or contradicts an earlier one, or the
                positions do not fit.
            UserError: An earlier call ended early.
        """
        if self.captured:
            return
        self.calls.hear(self._watch.check, self._late.check)
        check_batch(positions, batch, new_len, len(self.layout.table))
        before = self.layout.snapshot()
        self._before = before.view
        self.calls.begin(ForwardCall(len(self.layers), new_len, held, self._undo(before)))
        total = self.columns + new_len
        spans = self._padding.spans(batch, new_len, total, mask)
        self.query_positions, self.new_positions = self._padding.positions(
            batch, new_len, total, mask, device
        )
        moved = self._rope.begin(
            positions, given, spans, self._before.lengths, self.query_positions
        )
        self._late.note(self._padding.wrong, moved)
        self.plan = self.layout.append(spans)
        self._reader.begin(self.layout, self.plan)
        if self.plan.arena >= 0:
            self._watch.note_packing()
        self._begin_step(self.plan.before, device)

    def _undo(self, before: Snapshot) -> Callable[[], None]:
        """Puts the cache back as it is now, after a call that has stored nothing."""
        padding, rope = self._padding.fork(), self._rope.state()

        def undo() -> None:
            self.layout.restore(before)
            self._padding = padding
            self._rope.restore(rope)
            self._forget_tables()

        return undo

    def enter(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer begins its part of the current call; see :meth:`BlockLayer.attend`.

        Returns:
            The rotary table by which the layer shall rotate the new columns.

        Raises:
            UserError: There is no call for it.
        """
        if self.captured:
            return rope
        self.calls.enter(layer, keys.shape[2])
        self.query_heads = queries.shape[1]
        return self._rope.table(rope, self.plan.spans, self.plan.before.lengths, queries.dtype)

    def leave(self, layer: int) -> None:
        """A layer has done its part of the current call."""
        if not self.captured and self.calls.leave(layer):
            self.end_forward()

    def end_forward(self) -> None:
        """Takes the columns of the call in that all layers have stored.

        Raises:
            UserError: A layer took no part.
        """
        if not self.captured and self.calls.end():
            self.columns += self.query_positions.shape[1]
            self.calls.close()

    def step_tables(self, device: torch.device) -> StepTables | None:
        """The tables of decode kernels, or None where the PyTorch path takes the steps."""
        if not (self.static_rope and self.protocol == "A" and self._rope.kept is None):
            return None
        layer, rope = self.layers[0], self._rope.counted
        shape = layer.decode_shape(self.query_heads)
        return self._kernels.tables(shape, self.layout, layer.store, rope, device)

    def _begin_step(self, before: View, device: torch.device) -> None:
        self.steps = None
        if not self.plan.decode or device.type != "cuda":
            return
        if (steps := self.step_tables(device)) is None:
            return
        self.step_places = steps.take_step(self.layout, before)
        self.step, self.steps = steps.step(), steps

    def count_step(self, steps: StepTables) -> None:
        """After a replayed step: the host's side of it, and packing of the tails that it filled."""
        self.calls.hear(self._watch.check, self._late.check)
        with self.calls.changing("a replayed step"):
            self.plan = self.layout.append([slice(0, 1)] * len(self.layout.table))
            if self.plan.arena >= 0:
                self._watch.note_packing()
            steps.count_token()
            for layer in self.layers:
                layer.store.pack_full(self.plan)
            self._padding.count_token()
            self.columns += 1

    def pieces(self, queries: torch.Size) -> list[Piece]:
        """The past that the current call reads, cut so that a piece's scores stay small.

        Args:
            queries: Shape of the queries, `(batch_size, num_heads, q_len, head_dim)`.
        """
        return self._reader.pieces(self._rope.read, queries, self.query_positions.device)

    def token_positions(self) -> torch.Tensor | None:
        """`new_positions`, or None where all of the call's columns are tokens."""
        return None if self.plan.whole(self.query_positions.shape[1]) else self.new_positions

    def starts_whole(self, keys: torch.Tensor) -> bool:
        """Whether the current call is the first, without padding, and small enough to read back.

        Args:
            keys: Of the current call, `[batch_size, num_kv_heads, new_len, head_dim]`.
        """
        first = not any(self.plan.before.lengths) and self.token_positions() is None
        return first and keys.numel() <= MOST_READ_BACK

    def past(self, queries: torch.Tensor) -> Past | None:
        """What the Triton kernels need to attend to the past, or None where they do not apply.

        Args:
            queries: Of the current call, `[batch_size, num_heads, q_len, head_dim]`.
        """
        if not self._reader.asked:
            layer, counted = self.layers[0], self._rope.kept is None
            plain = counted and not layer.codec.rotated_keys
            shape = layer.decode_shape(self.query_heads) if plain else None
            self._reader.find(self._rope.counted, queries, shape, layer.store.kv_heads)
        return self._reader.past

    def settle(self) -> None:
        """Waits for the device and raises if what it packed so far is not whole.

        Raises:
            OutlierOverflow: Outliers were lost for want of room.
            ValueError: The input held NaN or Inf.
        """
        self.calls.check()
        self._watch.settle()
        self._late.settle()

    def widen(self) -> None:
        """Gives the next caches of these codecs the room for outliers that this one lacked."""
        widen_codecs(layer.store for layer in self.layers)

    def status(self, device: torch.device) -> torch.Tensor | None:
        """See :meth:`OutlierWatch.status`."""
        return self._watch.status(device)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, of whole calls."""
        return list(self._before.lengths if self.calls.running else self.layout.lengths)

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first call."""
        return len(self._before.lengths if self.calls.running else self.layout.table) or -1

    @property
    def kept_nbytes(self) -> int:
        """Bytes of rotary tables that are kept per token (:class:`KeptRope`)."""
        return 0 if self._rope.kept is None else self._rope.kept.nbytes

    def reset(self) -> None:
        """Forgets everything."""
        self.layout = self.layout.empty()
        self._reader, self._kernels = PastReader(simulated=self.protocol == "B"), KernelSteps()
        self._padding, self._watch, self._late = Padding(), OutlierWatch(), LateCheck()
        self._rope = self._rope.empty()
        self.columns = 0
        for layer in self.layers:
            layer.store = BlockStore(layer.codec)
        self.calls = CallRecord()

    def _select(self, indices: torch.Tensor) -> None:
        if not self.layout.table:
            return
        order, before = indices.tolist(), len(self.layout.table)
        with self.calls.changing("choosing or cutting its sequences"):
            self.layout.select(order)
            self._forget_tables()
            self._padding.select(indices)
            self._rope.select(indices, order)
            for layer in self.layers:
                layer.store.select(indices)
            if len(set(order)) < before:
                self._reclaim()

    def _reclaim(self) -> None:
        """Returns the memory of blocks that no sequence has any more."""
        change = self.layout.reclaim()
        if change is not None:
            for layer in self.layers:
                layer.store.reclaim(change)

    def _forget_tables(self) -> None:
        self._reader.forget_blocks()
        self._kernels.forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences for beam search, if there is one index in range per sequence.

        Packed blocks are shared, not moved.
        """
        self.calls.check()
        self._select(sequence_indices("beam_idx", beam_idx, self.batch_size, whole=True))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences, checked by :func:`sequence_indices`."""
        self.calls.check()
        self._select(sequence_indices("indices", indices, self.batch_size))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence; its blocks are shared.

        Raises:
            ValueError: `repeats` is not at least 1.
        """
        if repeats < 1:
            raise ValueError(f"repeats: must be at least 1, got {repeats}")
        self.calls.check()
        self._select(torch.arange(len(self.layout.table)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Drops columns from the end.

        Tokens in 16 bits are cut exactly. Where the cut falls into a packed block, its remaining
        tokens go back to the 16-bit tail with their quantized values.

        Args:
            tokens_to_remove: Negative or 0: minus the columns to drop, as transformers' newest
                release counts. Positive: the columns to keep, as its older ones do.
        """
        self.calls.check()
        columns, tokens_to_remove = self.columns, int(tokens_to_remove)  # a tensor in 5.17
        keep = columns + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if keep >= columns:
            return
        if keep <= 0:
            self.reset()
            return
        with self.calls.changing("choosing or cutting its sequences"):
            lengths = self._padding.crop(keep) or [keep] * len(self.layout.table)
            cuts = self.layout.crop(lengths)
            self._forget_tables()
            for layer in self.layers:
                layer.store.uncut(cuts)
            self._reclaim()
            self.columns = keep

    def copy(self) -> KVQuantCache:
        """A cache that goes on from here, to reuse a prompt; packed blocks are shared."""
        self.calls.check()
        codecs, rope = [layer.codec for layer in self.layers], self._rope.fork()
        other = KVQuantCache(codecs, rope.counted, self.protocol, static_rope=self.static_rope)
        other._rope, other.layout = rope, self.layout.fork()
        other._padding = self._padding.fork()
        other._watch = self._watch.fork()
        other.query_heads = self.query_heads
        other.columns, other.rotary = self.columns, self.rotary
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.store = mine.store.fork()
        return other

    def __copy__(self) -> KVQuantCache:
        """See :meth:`copy`; layers know their cache, so that two cannot share them."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVQuantCache:
        """See :meth:`copy`."""
        return self.copy()

    def __reduce__(self) -> Any:
        """Refused: a pickle would hold the model with it.

        Raises:
            UserError: Always.
        """
        raise UserError("cache: cannot be pickled or saved; take a copy() to reuse a prompt")
