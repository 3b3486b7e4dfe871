"""KVQuant's published procedure (Hooper et al., arXiv 2401.18079): the baseline of speed claims.

Written from a description of the public code's steps (SqueezeAILab/KVQuant, deployment part, commit
57a2383 of July 2024), without its text, on the quantizer files of `nuq`, whose numbers it gives
back. What mirrors what:

- Prompt: attended in full precision, keys and values whole in 16 bits; then packed, sequence by
  sequence, as the code knows batches of one only.
- Packing: fp32 copies, transposed to token by channel; nearest level of a table written out for
  every channel (keys) or token (values, fp32); codes packed along the channels of a token, into
  memory allocated ahead.
- Keys, before RoPE: outliers outside the calibrated range, in the code's true compressed format.
  They are counted, the count is read back to the host to size buffers, then gathered; stored is
  what the edge level lacks.
- Values: the k largest and smallest of a token by top-k, the next ones give the range; outliers get
  the middle code, and what it lacks is stored.
- Outliers: fp32 values, int32 channels, int32 pointers a token.
- Append of a token: the same steps; each array of outliers grows by concatenation, so it is
  allocated and copied anew, for keys and for values, with one wait of the host each.
- Sinks: keys after RoPE and values in 16 bits.

Better than the code, so that the comparison is not won by its faults: prompts of a batch share one
forward pass; grouped-query attention, padding, any head_dim; appends of several tokens; no array
of start rows, which the code fills in a loop with a read from the device per token; top-k stays on
the device, where the code sends a new token's to the CPU; full capacity grows. Worse: steps are
PyTorch operations where the code has a kernel. Its decode kernels have no counterpart: decoding
dequantizes piece by piece, so prefill and append are what may be compared. Not built: the format of
fixed width (42 entries a token), which changes the numbers where a token has more outliers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvquant.cache.attending import (
    AttendingCache,
    AttendingLayer,
    CallPlan,
    Extent,
    FullAttention,
    NewTokens,
    Protocol,
)
from kvquant.cache.forward_call import CallRecord, ForwardCall
from kvquant.cache.interface import CountedCache, QuantizeClock, sequence_indices
from kvquant.cache.kept_rope import Table
from kvquant.cache.layout import Span
from kvquant.cache.padding import host_mask
from kvquant.cache.positions import Shifts, shifts
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.rope import Rope, rotate
from kvquant.kernels.blockwise_attention import NEVER, BlockwiseAttention
from kvquant.schemes.kvquant_store import ReferenceTables, SequenceStore
from kvquant.schemes.registry import CacheFactory, ModelShape
from kvquant.study.schemes import KvquantRefScheme


@dataclass(frozen=True)
class ReferencePlan(CallPlan):
    """What every layer does in one call.

    Attributes:
        spans: Columns of each sequence that are tokens.
        new_positions: int64 `[batch_size, new_len]`, positions as keys; `NEVER` for padding.
        key_positions: int64 `[1, columns]`, positions of all keys.
        key_rope: Rotary table of `key_positions`.
        simulated: Whether the call's own tokens are read from the cache, too (protocol B).
        mask: bool `[batch_size, columns]` on the host after the call; None if all are tokens.
        shifts: Shifts of positions after the call.
        storing: To be called before anything is stored: the call cannot be undone from then on.
    """

    spans: list[Span]
    new_positions: torch.Tensor
    key_positions: torch.Tensor
    key_rope: Table
    simulated: bool
    mask: torch.Tensor | None
    shifts: Shifts
    storing: Callable[[], None]


class ReferenceLayer(AttendingLayer[ReferencePlan]):
    """A layer of :class:`ReferenceCache`: one store per sequence.

    Args:
        tables: Calibration of the layer.
        extent: See :class:`AttendingLayer`.
        clock: See :class:`AttendingLayer`.
    """

    is_croppable = False

    def __init__(self, tables: ReferenceTables, extent: Extent, clock: QuantizeClock) -> None:
        super().__init__(extent, clock)
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
        """Attention over what is stored, one sequence after the other."""
        parts = []
        for b, store in enumerate(self.stores):
            row = slice(b, b + 1)
            positions, heads = plan.query_positions[row], new.keys.shape[1]
            attention = BlockwiseAttention(new.queries[row], positions, heads, scaling)
            for first, k, v, rotated in store.pieces():
                where = slice(first, first + k.shape[2])
                cos, sin = plan.key_rope
                k = k if rotated else rotate(k, cos[:, where], sin[:, where])
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


class ReferenceCache(AttendingCache[ReferencePlan], CountedCache):
    """KVQuant's cache (see the module).

    Args:
        tables: One table per layer.
        rope: Positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`.
        protocol: See :class:`AttendingCache`.
    """

    def __init__(self, tables: list[ReferenceTables], rope: Rope, protocol: Protocol = "A") -> None:
        extent, clock = Extent(), QuantizeClock()
        layers = [ReferenceLayer(t, extent, clock) for t in tables]
        super().__init__(layers, protocol, extent, clock)
        self._rope = rope
        # bool [batch_size, columns] on the host; None as long as all are tokens
        self._mask: torch.Tensor | None = None
        self._shifts: Shifts | None = None  # of positions, before the first call

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
    ) -> ReferencePlan:
        """See :meth:`AttendingCache.begin_forward`; waits for the device, as the public code does.

        Raises:
            ValueError: The mask contradicts an earlier one, or positions are not counted.
            UserError: An earlier call ended early.
        """
        self.calls.check()
        lengths = [store.length for store in self.layers[0].stores] or [0] * batch
        if len(lengths) != batch:
            raise ValueError(f"input_ids: a batch of {batch}, but the cache holds {len(lengths)}")
        past, total = self.columns, self.columns + new_len
        queries = keys = torch.arange(past, total, device=device).expand(batch, -1)
        spans: list[Span] = [slice(0, new_len)] * batch
        new_mask = None
        if mask is None and self._mask is not None:
            raise ValueError("attention_mask: needed for every call of a padded batch")
        if mask is not None:
            host = self._host_mask(mask, batch, total)
            new_mask = None if bool(host.all()) else host
            counts = mask.bool().long().cumsum(1)
            queries = (counts[:, past:] - 1).clamp(min=0)
            keys = torch.where(mask[:, past:].bool(), queries, NEVER)
            spans = [_span(row) for row in host[:, past:]]
        followed, shifted = self._follow(positions, given, spans, lengths)
        self.calls.begin(ForwardCall(len(self.layers), new_len, held, lambda: None))
        key_positions = torch.arange(total, device=device)[None]
        plan = ReferencePlan(
            query_positions=queries,
            rope=self._rope(queries) if shifted else None,
            spans=spans,
            new_positions=keys,
            key_positions=key_positions,
            key_rope=self._rope(key_positions),
            simulated=self.protocol == "B",
            mask=new_mask,
            shifts=followed,
            storing=self.calls.store,
        )
        self.calls.planned(plan)
        return plan

    def _host_mask(self, mask: torch.Tensor, batch: int, total: int) -> torch.Tensor:
        """The mask of a call on the host, if it goes on from the earlier ones."""
        if mask.dim() != 2 or tuple(mask.shape) != (batch, total):
            raise ValueError(
                f"attention_mask: shape {tuple(mask.shape)}, expected {(batch, total)}"
            )
        host, past = host_mask(mask), self.columns
        known = torch.ones_like(host[:, :past]) if self._mask is None else self._mask
        if not torch.equal(host[:, :past], known):
            raise ValueError(
                "attention_mask: an earlier column was a token and is padding now, or was "
                "padding and is a token now; keep the earlier columns"
            )
        return host

    def _follow(
        self, positions: torch.Tensor | None, given: bool, spans: list[Span], lengths: list[int]
    ) -> tuple[Shifts, bool]:
        """The shifts after a call, and whether its positions are not the numbers of its tokens."""
        old = self._shifts or Shifts([0] * len(lengths), True)
        if positions is None:
            return old, False
        new = shifts(positions, spans, lengths)
        followed = None if new is None else old.follow(new, lengths, given)
        if new is None or followed is None:
            raise ValueError(
                "position_ids: KVQuant's cache counts the tokens of a sequence and takes no "
                "positions that jump; pass attention_mask.cumsum(1) - 1 of the new columns"
            )
        return followed, any(new)

    def meet(
        self, plan: ReferencePlan, queries: torch.Tensor, keys: torch.Tensor, rope: Table
    ) -> ReferencePlan:
        """See :meth:`AttendingCache.meet`."""
        if plan.rope is None:
            return plan
        return replace(plan, rope=(plan.rope[0].to(keys.dtype), plan.rope[1].to(keys.dtype)))

    def ended(self, plan: ReferencePlan) -> None:
        """See :meth:`AttendingCache.ended`."""
        self._mask, self._shifts = plan.mask, plan.shifts

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first call."""
        return len(self.layers[0].stores) or -1

    def _choose(self, order: list[int]) -> None:
        if not self.layers[0].stores:
            return
        with self.calls.changing("a choice of sequences"):
            if self._mask is not None:
                self._mask = self._mask[order]
            if self._shifts is not None:
                self._shifts = self._shifts.select(order)
            self._choose_stores(order)

    def _choose_stores(self, order: list[int]) -> None:
        for layer in self.layers:
            used: set[int] = set()
            stores = []
            for i in order:
                stores.append(layer.stores[i].fork() if i in used else layer.stores[i])
                used.add(i)
            layer.stores = stores

    def copy(self) -> ReferenceCache:
        """A cache that goes on from here, to reuse a prompt."""
        self.calls.check()
        tables = [layer.tables for layer in self.layers]
        other = ReferenceCache(tables, self._rope, self.protocol)
        other.extent.columns, other.rotary = self.columns, self.rotary
        other._mask, other._shifts = self._mask, self._shifts
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.stores = [store.fork() for store in mine.stores]
        return other

    def __copy__(self) -> ReferenceCache:
        """See :meth:`copy`; two caches cannot share layers."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceCache:
        """See :meth:`copy`; the model, whose rotary embedding it holds, is not copied."""
        return self.copy()

    def reset(self) -> None:
        """Forgets everything."""
        self.extent.columns, self.calls = 0, CallRecord()
        self._mask = self._shifts = None
        for layer in self.layers:
            layer.stores = []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences for beam search."""
        count = len(self.layers[0].stores) or -1
        self._choose(sequence_indices("beam_idx", beam_idx, count, whole=True).tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences (int64 indices or a bool mask)."""
        count = len(self.layers[0].stores) or -1
        self._choose(sequence_indices("indices", indices, count).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        if repeats < 1:
            raise ValueError(f"repeats: must be at least 1, got {repeats}")
        count = len(self.layers[0].stores)
        self._choose([i for i in range(count) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the public code writes a slot once."""
        raise NotImplementedError("crop: KVQuant's cache cannot be cut")

    def stored_nbytes(self) -> int:
        """Bytes allocated, tables included."""
        stores = sum(store.nbytes for layer in self.layers for store in layer.stores)
        return stores + self.shared_nbytes()

    def shared_nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(layer.tables.nbytes for layer in self.layers if layer.stores)

    def stored_elements(self, mask: torch.Tensor | None) -> int:
        """Key and value elements of tokens."""
        return sum(
            2 * layer.tables.heads * layer.tables.dim * store.length
            for layer in self.layers
            for store in layer.stores
        )


def _span(row: torch.Tensor) -> Span:
    """Columns of a bool row on the host, as a slice where they follow each other."""
    where = row.nonzero().view(-1)
    if not where.numel():
        return slice(0, 0)
    first, last = int(where[0]), int(where[-1])
    return slice(first, last + 1) if last - first + 1 == where.numel() else where


def make_caches(
    spec: KvquantRefScheme, shape: ModelShape, tables: list[LayerQuantizer]
) -> CacheFactory:
    """Returns what makes empty caches over one set of tables."""
    found = [ReferenceTables(spec, layer) for layer in tables]
    return lambda protocol, rope: ReferenceCache(found, rope, protocol)
