"""The Hugging Face cache whose layers hold packed blocks.

`KVQuantCache` is passed to a model as `past_key_values`; the attention modules installed by
:func:`kvquant.models.load_quantized_model` read and write it. Once per forward call the model tells
the cache which columns are tokens (`begin_forward`), so that padding is neither stored nor counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from kvquant.block_layer import BlockLayer
from kvquant.block_store import BlockStore
from kvquant.cache_interface import AttendingCache, sequence_indices
from kvquant.continuation import Past, block_table, range_blocks
from kvquant.decode_step import StepTables
from kvquant.errors import OutlierOverflow, UserError
from kvquant.forward_call import CallRecord, ForwardCall
from kvquant.kept_rope import KeptRope
from kvquant.kernels.cuda_decode import DecodeStep
from kvquant.kernels.dispatch import use_cuda, use_triton_attention
from kvquant.late_check import LateCheck, on_device
from kvquant.layout import AppendPlan, Layout, Snapshot, Span, View
from kvquant.outlier_watch import OutlierWatch, widen_codecs
from kvquant.padding import Padding
from kvquant.past_pieces import Piece, cut_past
from kvquant.positions import Shifts, shifts
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
        self._rope = rope
        # Codecs that hold rotated keys hold the positions with them.
        self._rotated = codecs[0].rotated_keys
        self._keep_rope = keep_rope and not self._rotated
        self._kept: KeptRope | None = KeptRope() if self._keep_rope else None
        self._shifts: Shifts | None = None  # before the first call
        # Of the current call: whether its first layer has brought the rotary table to be kept;
        # and the table of counted positions, where the model's is shifted.
        self._rope_taken = False
        self._counted_rope: tuple[torch.Tensor, torch.Tensor] | None = None
        self._padding = Padding()
        self._pieces: list[Piece] | None = None
        # Of the current call's kernels; False: not asked yet. Block numbers outlive a call.
        self._past: Past | Literal[False] | None = False
        self._block_table: tuple[list[int], torch.Tensor | None] | None = None
        self._watch, self._late = OutlierWatch(), LateCheck()
        self.static_rope = static_rope
        # Of a decode step that kernels take: None in other calls.
        self.steps: StepTables | None = None
        self.step: DecodeStep
        self.step_places: torch.Tensor
        self.captured = False  # a graph plans its calls itself (kvquant.graphed)
        self.query_heads = 0  # learnt from the first call
        self._step_tables: StepTables | None = None

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
        """Notes which columns of the coming call are tokens and plans where they go.

        Args:
            batch: Sequences.
            new_len: New columns.
            mask: `[batch_size, columns]` with 1 = token, 0 = padding, or None for no padding.
            device: Of the model.
            positions: int64 `[1 or batch_size, new_len]` that the new columns are rotated by, or
                None: a token's number in its sequence.
            given: Whether the caller of the model gave the positions; else they are its default.
            held: See :meth:`AttendingCache.begin_forward`.

        Raises:
            ValueError: The mask does not cover all columns or contradicts an earlier one, or the
                positions do not fit.
            UserError: An earlier call ended early.
        """
        if self.captured:
            return
        self.calls.check()
        self._look_at_the_device()
        if positions is not None and (
            positions.dim() != 2
            or positions.shape[0] not in (1, batch)
            or positions.shape[1] != new_len
        ):
            raise ValueError(
                f"position_ids: shape {tuple(positions.shape)}, expected {(batch, new_len)}"
            )
        if self.layout.table and batch != len(self.layout.table):
            raise ValueError(
                f"input_ids: a batch of {batch}, but the cache holds {len(self.layout.table)}"
            )
        before = self.layout.snapshot()
        self._before, self._rope_taken = before.view, False
        self.calls.begin(ForwardCall(len(self.layers), new_len, held, self._undo(before)))
        total = self.columns + new_len
        spans = self._padding.spans(batch, new_len, total, mask)
        self._pieces, self._past = None, False
        self.query_positions, self.new_positions = self._padding.positions(
            batch, new_len, total, mask, device
        )
        self._take_positions(positions, given, spans, device)
        self.plan = self.layout.append(spans)
        if self.plan.arena >= 0:
            self._watch.note_packing()
        self._begin_step(self.plan.before, device)

    def _undo(self, before: Snapshot) -> Callable[[], None]:
        """Puts the cache back as it is now, after a call that has stored nothing."""
        padding, kept, moved = self._padding.fork(), self._kept, self._shifts

        def undo() -> None:
            self.layout.restore(before)
            self._padding, self._kept, self._shifts = padding, kept, moved
            self._forget_tables()

        return undo

    def _look_at_the_device(self) -> None:
        """Raises for what earlier calls lost or got wrong, as far as the host can know."""
        try:
            self._watch.check()
            self._late.check()
        except (OutlierOverflow, ValueError) as error:
            self.calls.refuse(error)
            raise

    def _take_positions(
        self, positions: torch.Tensor | None, given: bool, spans: list[Span], device: torch.device
    ) -> None:
        """Finds out how the new tokens are rotated, and keeps their rotary tables if need be."""
        self._counted_rope = None
        wrong = self._padding.wrong
        if positions is None or self._rotated or self._kept is not None:
            self._late.note(wrong, None)
            return
        lengths = self.layout.lengths or [0] * len(spans)
        old = self._shifts or Shifts([0] * len(spans), True)
        if (
            on_device(positions)
            and positions.shape[1] == 1
            and all(lengths)
            and (old.zero or not old.open)
        ):  # a decode step: looking would wait for the device
            moved = positions - self.query_positions
            if not old.zero:
                moved = moved - torch.tensor(old.known).to(device, non_blocking=True)[:, None]
            self._late.note(wrong, moved.any())
            self._shifts = Shifts(old.known, False)
        else:
            self._late.note(wrong, None)
            new = shifts(positions, spans, lengths)
            self._shifts = None if new is None else old.follow(new, lengths, given)
            if self._shifts is None:
                self._kept = KeptRope.counted(self._rope, lengths, old.known, device)
                return
            if new is not None and not any(new):
                return
        if not self._shifts.zero:
            self._counted_rope = self._rope(self.query_positions)

    def enter(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer begins its part of the current call.

        Args:
            layer: Its number.
            queries: `[batch_size, num_heads, new_len, head_dim]`.
            keys: `[batch_size, num_kv_heads, new_len, head_dim]`.
            rope: Rotary table of the new columns, `[1 or batch_size, new_len, head_dim]` each.

        Returns:
            The rotary table by which the layer shall rotate the new columns.

        Raises:
            UserError: There is no call for it.
        """
        if self.captured:
            return rope
        self.calls.enter(layer, keys.shape[2])
        self.query_heads = queries.shape[1]
        if self._kept is not None and not self._rope_taken:
            self._kept.append(rope, self.plan.spans, self.plan.before.lengths)
            self._rope_taken = True
        if self._counted_rope is None:
            return rope
        cos, sin = self._counted_rope
        return cos.to(queries.dtype), sin.to(queries.dtype)

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
        store, codec = self.layers[0].store, self.layers[0].codec
        if not (self.static_rope and self.protocol == "A" and store.tail is not None):
            return None
        if self._kept is not None:
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
        self._look_at_the_device()
        with self.calls.changing("a replayed step"):
            batch = len(self.layout.table)
            self.plan = self.layout.append([slice(0, 1)] * batch)
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
        if self._pieces is None:
            simulated = self.protocol == "B"
            view = self.plan.after if simulated else self.plan.before
            # A step's queries see all that came before; others need their positions compared.
            causal = simulated and queries[2] > 1
            device = self.query_positions.device
            rope = self._rope if self._kept is None else self._kept.read
            self._pieces = cut_past(self.layout, view, rope, queries, device, causal=causal)
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
        if store.tail is None or codec.rotated_keys or self._kept is not None:
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
        return 0 if self._kept is None else self._kept.nbytes

    def reset(self) -> None:
        """Forgets everything."""
        old = self.layout
        self.layout = Layout(old.sinks, old.block_size, old.residual)
        self._pieces = self._step_tables = None
        self._padding, self._watch, self._late = Padding(), OutlierWatch(), LateCheck()
        self._past, self._block_table = False, None
        self._kept = KeptRope() if self._keep_rope else None
        self._shifts = None
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
            if self._kept is not None:
                self._kept.select(indices)
            if self._shifts is not None:
                self._shifts = self._shifts.select(order)
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
        self._block_table = None
        if self._step_tables is not None:
            self._step_tables.forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences for beam search; packed blocks are shared, not moved.

        Raises:
            ValueError: There is not one index per sequence, or one is out of range.
        """
        self.calls.check()
        self._select(sequence_indices("beam_idx", beam_idx, self.batch_size, whole=True))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences (int64 indices or a bool mask).

        Raises:
            ValueError: The mask is not one bool per sequence, or an index is out of range.
        """
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
        codecs = [layer.codec for layer in self.layers]
        other = KVQuantCache(
            codecs,
            self._rope,
            self.protocol,
            static_rope=self.static_rope,
            keep_rope=self._keep_rope,
        )
        other.layout = self.layout.fork()
        other._padding = self._padding.fork()
        other._watch = self._watch.fork()
        other.query_heads = self.query_heads
        other._shifts = self._shifts
        other._kept = None if self._kept is None else self._kept.fork()
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
