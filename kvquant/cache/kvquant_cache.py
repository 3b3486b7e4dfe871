"""`KVQuantCache` is the Hugging Face cache whose layers hold packed blocks.

It is passed to a model as `past_key_values`, and the attention modules installed by
`load_quantized_model` read and write it. Once per forward call the model tells the cache
which columns are tokens (`begin_forward`), so that padding is neither stored nor counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from kvquant.cache.attending import AttendingCache, Extent, Protocol
from kvquant.cache.block_layer import BlockLayer
from kvquant.cache.block_store import BlockStore
from kvquant.cache.call_rope import CallRope
from kvquant.cache.codec import Codec
from kvquant.cache.decode_step import StepTables
from kvquant.cache.forward_call import CallRecord, ForwardCall
from kvquant.cache.forward_plan import ForwardPlan
from kvquant.cache.interface import QuantizeClock, sequence_indices
from kvquant.cache.kept_rope import Table
from kvquant.cache.late_check import LateCheck
from kvquant.cache.layout import Layout, Snapshot
from kvquant.cache.outlier_watch import OutlierWatch, widen_codecs
from kvquant.cache.padding import Padding
from kvquant.cache.planner import Planner
from kvquant.cache.positions import check_batch
from kvquant.errors import UserError
from kvquant.formats.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix
from kvquant.formats.rope import Rope


class KVQuantCache(AttendingCache[ForwardPlan]):
    """A transformers cache of packed blocks.

    Args:
        codecs: One codec per layer.
        rope: Maps positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`.
        protocol: See :class:`AttendingCache`.
        static_rope: Whether a position's rotation does not depend on the length of the sequence, as
            decode kernels need.
        keep_rope: Whether to keep the rotation of each token, because that of a position changes
            from call to call (dynamic scaling).

    Attributes:
        layout: The places of all tokens, shared by all layers.
        graphs: Whether the model may run its decode steps as a CUDA graph.
        steps: What :mod:`kvquant.models.graph_calls` knows of the steps so far; None before.
        changes: Number of times that sequences were chosen, cut or joined.
    """

    graphs: bool = True
    steps: Any = None
    changes: int = 0

    def __init__(
        self,
        codecs: list[Codec],
        rope: Rope,
        protocol: Protocol = "A",
        *,
        static_rope: bool = False,
        keep_rope: bool = False,
    ) -> None:
        shapes = {(c.sinks, c.block_size, c.residual) for c in codecs}
        if len(shapes) != 1:
            raise ValueError("codecs: all layers need the same sinks, block_size and residual")
        extent, clock = Extent(), QuantizeClock()
        layers = [BlockLayer(codec, extent, clock) for codec in codecs]
        super().__init__(layers, protocol, extent, clock)
        self.layout = Layout(*shapes.pop())
        self.static_rope = static_rope
        self._before = self.layout.view()  # the state before the current call
        self._rope = CallRope(rope, keep=keep_rope, rotated=codecs[0].rotated_keys)
        self._padding = Padding()
        self._watch, self._late = OutlierWatch(), LateCheck()
        self._planner = self._new_planner()

    def _new_planner(self, query_heads: int = 0) -> Planner:
        return Planner(
            self.layout,
            self._rope,
            self.layers[0].store,
            simulated=self.protocol == "B",
            static_rope=self.static_rope,
            narrow_tables=all(layer.codec.narrow_tables for layer in self.layers),
            storing=self.calls.store,
            query_heads=query_heads,
        )

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
    ) -> ForwardPlan:
        """Plans where the new tokens go; see :meth:`AttendingCache.begin_forward`.

        Raises:
            ValueError: The mask does not cover all columns or contradicts an earlier one, or the
                positions do not fit.
            UserError: An earlier call ended early.
        """
        if self.calls.handed is not None:
            return self.calls.handed
        self.calls.hear(self._watch.check, self._late.check)
        check_batch(positions, batch, new_len, len(self.layout.table))
        before = self.layout.snapshot()
        self._before = before.view
        self.calls.begin(ForwardCall(len(self.layers), new_len, held, self._undo(before)))
        total = self.columns + new_len
        spans = self._padding.spans(batch, new_len, total, mask)
        where = self._padding.positions(batch, new_len, total, mask, device)
        moved = self._rope.begin(positions, given, spans, self._before.lengths, where[0])
        self._late.note(self._padding.wrong, moved)
        append = self.layout.append(spans)
        if append.arena >= 0:
            self._watch.note_packing()
        plan = self._planner.begin(append, *where, past=self.columns > 0)
        self.calls.planned(plan)
        return plan

    def _undo(self, before: Snapshot) -> Callable[[], None]:
        """Returns a function that restores the present state if a call has stored nothing."""
        padding, rope = self._padding.fork(), self._rope.state()

        def undo() -> None:
            self.layout.restore(before)
            self._padding = padding
            self._rope.restore(rope)
            self._planner.forget_blocks()

        return undo

    def meet(
        self, plan: ForwardPlan, queries: torch.Tensor, keys: torch.Tensor, rope: Table
    ) -> ForwardPlan:
        """Completes the plan with what the first layer brings; see :meth:`AttendingCache.meet`."""
        return self._planner.meet(plan, queries, keys, rope, self._watch.status(keys.device))

    def step_tables(self, device: torch.device) -> StepTables | None:
        """Returns the decode kernel's tables, or None where another backend takes the steps."""
        return self._planner.step_tables(device)

    def step_refusals(self, device: torch.device) -> tuple[str, ...]:
        """Returns the reasons why the decode kernel cannot take the next step of all sequences.

        Args:
            device: Device of the cache.
        """
        selection = self._planner.select_step(device)
        if selection is None:
            return ("cache: it is empty; call the model with the prompts first",)
        shortest, sinks = min(self.lengths), self.layout.sinks
        if shortest < sinks:
            told = f"lengths: a sequence of {shortest} tokens is shorter than the {sinks} sinks"
            return (f"{told}; call the model until it is longer", *selection.reasons("cuda"))
        return selection.reasons("cuda")

    def graph_plan(self, steps: StepTables, positions: torch.Tensor) -> ForwardPlan:
        """Makes the plan of a step for a CUDA graph, whose lengths advance on the device alone.

        :meth:`count_step` updates the host after each replay.

        Args:
            steps: Tables with room for the steps to come.
            positions: int64 `[batch_size, 1]`, which the graph advances.
        """
        return self._planner.graph(steps, positions, self._watch.status(positions.device))

    def planned(self, plan: ForwardPlan) -> AbstractContextManager[None]:
        """Returns a context in which the model follows a graph's plan and nothing is counted."""
        return self.calls.handing(plan)

    def count_step(self, steps: StepTables) -> None:
        """Counts a replayed step on the host and packs the blocks that it filled."""
        self.calls.hear(self._watch.check, self._late.check)
        with self.calls.changing("a replayed step"):
            append = self.layout.append([slice(0, 1)] * len(self.layout.table))
            if append.arena >= 0:
                self._watch.note_packing()
            steps.count_token()
            for layer in self.layers:
                layer.store.pack_full(append)
            self._padding.count_token()
            self.extent.columns += 1

    def continues_counting(self, given: bool) -> bool:
        """Returns whether the next tokens' positions are the numbers of tokens so far.

        Args:
            given: Whether the caller gives positions; the model's own count padding.
        """
        return self._rope.counts and (given or not self._padding.any)

    def check_step(
        self, mask: torch.Tensor | None, positions: torch.Tensor | None, expected: torch.Tensor
    ) -> None:
        """Checks the mask and positions of a step before its graph runs, as for any other call.

        Args:
            mask: `[batch_size, columns + 1]`, or None.
            positions: int64 `[1 or batch_size, 1]` on the device, or None.
            expected: int64 `[batch_size, 1]`, the positions that the graph uses.

        Raises:
            ValueError: The mask or an earlier one does not fit, or the positions' shape.
        """
        self.calls.hear(self._watch.check, self._late.check)
        batch = len(self.layout.table)
        check_batch(positions, batch, 1, batch)
        padding = self._padding.fork()  # the step itself counts the token
        padding.spans(batch, 1, self.columns + 1, mask)
        moved = None if positions is None else (positions != expected).any()
        self._late.note(padding.wrong, moved)

    def settle(self) -> None:
        """Waits for the device and raises if any call so far went wrong.

        Raises:
            OutlierOverflow: Outliers were lost because there was no room for them.
            ValueError: The input held NaN or Inf, or a mask or positions did not fit.
        """
        self.calls.check()
        self._watch.settle()
        self._late.settle()

    def widen(self) -> None:
        """Gives later caches of these codecs the outlier slots that this one lacked."""
        widen_codecs(layer.store for layer in self.layers)

    def key_outliers(self, layer: int) -> list[BlockedCSCMatrix]:
        """Returns the key outliers in a layer's packed blocks, one matrix per sequence."""
        store = self.layers[layer].store
        return [BlockedCSCMatrix(store.outliers("keys", table)) for table in self.layout.table]

    def value_outliers(self, layer: int) -> list[BlockedCSRMatrix]:
        """Returns the value outliers in a layer's packed blocks, one matrix per sequence."""
        store = self.layers[layer].store
        return [BlockedCSRMatrix(store.outliers("values", table)) for table in self.layout.table]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence in completed calls."""
        return list(self._before.lengths if self.calls.running else self.layout.lengths)

    @property
    def batch_size(self) -> int:
        """The number of sequences; -1 before the first call."""
        return len(self._before.lengths if self.calls.running else self.layout.table) or -1

    @property
    def kept_nbytes(self) -> int:
        """The bytes of rotary tables that are kept per token (:class:`KeptRope`)."""
        return 0 if self._rope.kept is None else self._rope.kept.nbytes

    def reset(self) -> None:
        """Empties the cache, which can then be used anew."""
        self.layout = self.layout.empty()
        self._padding, self._watch, self._late = Padding(), OutlierWatch(), LateCheck()
        self._rope = self._rope.empty()
        self.extent.columns = 0
        self.steps, self.changes = None, self.changes + 1
        for layer in self.layers:
            layer.store = BlockStore(layer.codec)
        self.calls = CallRecord()
        self._planner = self._new_planner()

    def _select(self, indices: torch.Tensor) -> None:
        if not self.layout.table:
            return
        self.changes += 1
        order, before = indices.tolist(), len(self.layout.table)
        with self.calls.changing("choosing or cutting its sequences"):
            self.layout.select(order)
            self._planner.forget_blocks()
            self._padding.select(indices)
            self._rope.select(indices, order)
            for layer in self.layers:
                layer.store.select(indices)
            if len(set(order)) < before:
                self._reclaim()

    def _reclaim(self) -> None:
        """Frees the memory of blocks that no sequence uses any more."""
        change = self.layout.reclaim()
        if change is not None:
            for layer in self.layers:
                layer.store.reclaim(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences for beam search; needs one index in range per sequence.

        Packed blocks are shared, not moved.
        """
        self.calls.check()
        self._select(sequence_indices("beam_idx", beam_idx, self.batch_size, whole=True))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences, whose indices :func:`sequence_indices` checks."""
        self.calls.check()
        self._select(sequence_indices("indices", indices, self.batch_size))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence; the copies share its blocks.

        Raises:
            ValueError: `repeats` is less than 1.
        """
        if repeats < 1:
            raise ValueError(f"repeats: must be at least 1, got {repeats}")
        self.calls.check()
        self._select(torch.arange(len(self.layout.table)).repeat_interleave(repeats))

    def take_over(self, others: Sequence[KVQuantCache]) -> None:
        """Appends the sequences of other caches of the same codecs, which become empty.

        :func:`kvquant.cache.joining.join_caches` checks the caches first.
        """
        sizes = [cache.batch_size for cache in (self, *others)]
        self.changes += 1
        with self.calls.changing("joining other caches"):
            offsets = self.layout.take_over([cache.layout for cache in others])
            paddings = [(c._padding, n, c.columns) for c, n in zip(others, sizes[1:], strict=True)]
            padded = len({cache.columns for cache in (self, *others)}) > 1
            self.extent.columns = self._padding.take_over(paddings, sizes[0], self.columns)
            self._rope.take_over([cache._rope for cache in others], sizes, padded=padded)
            for number, layer in enumerate(self.layers):
                layer.store.take_over([c.layers[number].store for c in others], offsets)
            self._planner.forget_blocks()
            self._before = self.layout.view()
        for cache in others:
            cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drops columns from the end.

        Tokens in 16 bits are cropped exactly. Where the cut falls into a packed block, its kept
        tokens return to the 16-bit tail with their quantized values.

        Args:
            tokens_to_remove: Negative or 0: minus the number of columns to drop, as in the newest
                transformers. Positive: the number of columns to keep, as in older releases.
        """
        self.calls.check()
        columns, tokens_to_remove = self.columns, int(tokens_to_remove)  # a tensor in 5.17
        keep = columns + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if keep >= columns:
            return
        if keep <= 0:
            self.reset()
            return
        self.changes += 1
        with self.calls.changing("choosing or cutting its sequences"):
            lengths = self._padding.crop(keep) or [keep] * len(self.layout.table)
            cuts = self.layout.crop(lengths)
            self._planner.forget_blocks()
            for layer in self.layers:
                layer.store.uncut(cuts)
            self._reclaim()
            self.extent.columns = keep

    def copy(self) -> KVQuantCache:
        """Returns an independent copy that shares packed blocks, to reuse a prompt."""
        self.calls.check()
        codecs, rope = [layer.codec for layer in self.layers], self._rope.fork()
        other = KVQuantCache(codecs, rope.counted, self.protocol, static_rope=self.static_rope)
        other._rope, other.layout = rope, self.layout.fork()
        other._padding, other._watch = self._padding.fork(), self._watch.fork()
        other.extent.columns, other.rotary = self.columns, self.rotary
        other.unrotated = self.unrotated
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.store = mine.store.fork()
        other._planner = other._new_planner(self._planner.query_heads)
        return other

    def __copy__(self) -> KVQuantCache:
        """Returns :meth:`copy`, as two caches cannot share layers."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVQuantCache:
        """Returns :meth:`copy`, which shares packed blocks."""
        return self.copy()

    def __reduce__(self) -> Any:
        """Refuses to pickle the cache, because a pickle would include the model.

        Raises:
            UserError: Always.
        """
        raise UserError("cache: cannot be pickled or saved; take a copy() to reuse a prompt")
