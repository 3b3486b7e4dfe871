"""`KVQuantCache` is the Hugging Face cache whose layers hold packed blocks.

It is passed to a model as `past_key_values`, and the attention modules installed by
`load_quantized_model` read and write it. Once per forward call the model tells the cache
which columns are tokens (`begin_forward`), so that padding is neither stored nor counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from kvquant.cache.attending import AttendingLayer
from kvquant.cache.block_layer import BlockLayer
from kvquant.cache.block_store import BlockStore
from kvquant.cache.decode_step import StepTables
from kvquant.cache.forward_call import ForwardCall
from kvquant.cache.forward_plan import ForwardPlan
from kvquant.cache.kept_rope import Table
from kvquant.cache.layout import Snapshot
from kvquant.cache.outlier_watch import widen_codecs
from kvquant.cache.packed_cache import PackedCache
from kvquant.cache.positions import check_batch
from kvquant.errors import UserError
from kvquant.formats.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix
from kvquant.kernels.prompt_attention import MIN_COLUMNS


class KVQuantCache(PackedCache):
    """A transformers cache of packed blocks.

    See :class:`~kvquant.cache.packed_cache.PackedCache` for its arguments and attributes.
    """

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
        """Plans where the new tokens go, as the base class says.

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
        eight_bits = self.prompt_attention == "8-bit" and new_len >= MIN_COLUMNS
        past = self.columns > 0
        plan = self._planner.begin(append, *where, past=past, eight_bits=eight_bits)
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
        self,
        plan: ForwardPlan,
        layer: AttendingLayer[ForwardPlan],
        queries: torch.Tensor,
        keys: torch.Tensor,
        rope: Table,
    ) -> ForwardPlan:
        """Completes the plan with what the first layer of a device that packs brings."""
        assert isinstance(layer, BlockLayer)
        status = self._watch.status(keys.device)
        return self._planner.meet(plan, layer.store, queries, keys, rope, status)

    def step_tables(self, device: torch.device) -> StepTables | None:
        """Returns the decode kernel's tables, or None where another backend takes the steps."""
        return self._planner.step_tables(device)

    def step_refusals(self, device: torch.device) -> tuple[str, ...]:
        """Returns the reasons why the decode kernel cannot take the next step of all sequences.

        Args:
            device: Device of the cache.
        """
        if not self.packed:
            return ("model: all layers have a sliding window, which no decode kernel reads",)
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

    def reserve_windows(self) -> list[torch.Tensor]:
        """Makes the rings of sliding windows as large as they can become, for a CUDA graph.

        Returns:
            Keys and values of each layer with a sliding window.
        """
        if self._windows is None:
            return []
        self._windows.reserve()
        for layer in self.sliding:
            layer.reserve(self._windows.capacity)
        return [x for layer in self.sliding if layer.ring is not None for x in layer.ring]

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
            for layer in self.packed:
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
        widen_codecs(layer.store for layer in self.packed)

    def _store(self, layer: int) -> BlockStore:
        """Returns the blocks of a layer.

        Raises:
            UserError: The layer has a sliding window, whose tokens are not packed.
        """
        found = self.layers[layer]
        if not isinstance(found, BlockLayer):
            raise UserError(f"layer: {layer} has a sliding window, which is kept in 16 bits")
        return found.store

    def key_outliers(self, layer: int) -> list[BlockedCSCMatrix]:
        """Returns the key outliers in a layer's packed blocks, one matrix per sequence."""
        store = self._store(layer)
        return [BlockedCSCMatrix(store.outliers("keys", table)) for table in self.layout.table]

    def value_outliers(self, layer: int) -> list[BlockedCSRMatrix]:
        """Returns the value outliers in a layer's packed blocks, one matrix per sequence."""
        store = self._store(layer)
        return [BlockedCSRMatrix(store.outliers("values", table)) for table in self.layout.table]
