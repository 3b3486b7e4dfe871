"""One layer of the cache that follows KVQuant's published procedure (see `kvquant_ref`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from kvquant.cache.attending import AttendingLayer, CallPlan, Extent, FullAttention, NewTokens
from kvquant.cache.device_copies import DeviceCopies
from kvquant.cache.interface import QuantizeClock
from kvquant.cache.kept_rope import Table
from kvquant.cache.layout import Span
from kvquant.cache.positions import Shifts
from kvquant.formats.rope import rotate
from kvquant.kernels.blockwise_attention import BlockwiseAttention
from kvquant.schemes.kvquant_store import ReferenceTables, SequenceStore


@dataclass(frozen=True)
class ReferencePlan(CallPlan):
    """The plan of one call, which all layers share.

    Attributes:
        spans: Columns of each sequence that are tokens.
        new_positions: int64 `[batch_size, new_len]`, positions of the new keys; `NEVER` for
            padding.
        key_positions: int64 `[1, columns]`, positions of all keys.
        key_rope: Rotary table of `key_positions`.
        simulated: Whether the call's own tokens are read from the cache as well (protocol B).
        mask: bool `[batch_size, columns]` on the host after the call; None if all are tokens.
        shifts: The shifts of positions after the call.
    """

    spans: list[Span]
    new_positions: torch.Tensor
    key_positions: torch.Tensor
    key_rope: Table
    simulated: bool
    mask: torch.Tensor | None
    shifts: Shifts

    def on(self, device: torch.device) -> Self:
        """Returns the plan for the layers of another device; see :meth:`CallPlan.on`."""
        copies = DeviceCopies(device)
        cos, sin = self.key_rope
        return replace(
            self,
            query_positions=copies.of(self.query_positions),
            rope=copies.of_table(self.rope),
            spans=copies.of_spans(self.spans),
            new_positions=copies.of(self.new_positions),
            key_positions=copies.of(self.key_positions),
            key_rope=(copies.of(cos), copies.of(sin)),
            window=None if self.window is None else self.window.copied(copies),
        )


class ReferenceLayer(AttendingLayer[ReferencePlan]):
    """A layer of :class:`ReferenceCache`, with one store per sequence.

    Args:
        tables: The calibration of the layer.
        extent: See :class:`AttendingLayer`.
        clock: See :class:`AttendingLayer`.
        soft_cap: Bound of the scores; None: there is none.
    """

    is_croppable = False

    def __init__(
        self,
        tables: ReferenceTables,
        extent: Extent,
        clock: QuantizeClock,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(extent, clock)
        self.soft_cap = soft_cap
        self.tables = tables
        self.stores: list[SequenceStore] = []

    def attend(
        self, plan: ReferencePlan, new: NewTokens, scaling: float, full: FullAttention
    ) -> torch.Tensor:
        """See :meth:`AttendingLayer.attend`."""
        if plan.simulated:
            self._append(plan, new)
            return self._read(plan, new, scaling)
        if any(store.length for store in self.stores):
            out = self._read(plan, new, scaling)
        else:
            out = full(new.queries, new.rotated_keys, new.values)
        self._append(plan, new)
        return out

    def _read(self, plan: ReferencePlan, new: NewTokens, scaling: float) -> torch.Tensor:
        """Computes attention over the stored tokens, one sequence after the other."""
        parts = []
        for b, store in enumerate(self.stores):
            row = slice(b, b + 1)
            positions, heads = plan.query_positions[row], new.keys.shape[1]
            attention = BlockwiseAttention(
                new.queries[row], positions, heads, scaling, self.soft_cap, new.sink_logits
            )
            for first, k, v, rotated in store.pieces():
                where = slice(first, first + k.shape[2])
                cos, sin = plan.key_rope
                if new.rotates and not rotated:
                    k = rotate(k, cos[:, where], sin[:, where])
                attention.add(k, v, plan.key_positions[:, where] if plan.simulated else None)
            if not plan.simulated:
                attention.add(new.rotated_keys[row], new.values[row], plan.new_positions[row])
            parts.append(attention.result())
        return torch.cat(parts)

    @torch.inference_mode()
    def _append(self, plan: ReferencePlan, new: NewTokens) -> None:
        """Packs the call's tokens, one sequence after the other."""
        kind = new.keys.dtype if new.keys.dtype is torch.bfloat16 else torch.float16
        plan.storing()
        with self.clock.measure(new.keys.device):
            for b, span in enumerate(plan.spans):
                given = (new.keys, new.rotated_keys, new.values)
                keys, rotated, values = (x[b][:, span].to(kind) for x in given)
                if len(self.stores) <= b:
                    self.stores.append(SequenceStore(self.tables, keys))
                self.stores[b].append(keys, rotated, values)
