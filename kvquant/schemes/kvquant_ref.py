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

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvquant.cache.block_layer import FullAttention
from kvquant.cache.forward_call import CallRecord, ForwardCall
from kvquant.cache.interface import (
    AttendingCache,
    CountedCache,
    QuantizeClock,
    sequence_indices,
)
from kvquant.cache.kvquant_cache import Protocol
from kvquant.cache.layout import Span
from kvquant.cache.padding import host_mask
from kvquant.cache.positions import Shifts, shifts
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.rope import Rope, rotate
from kvquant.kernels.blockwise_attention import NEVER, BlockwiseAttention
from kvquant.schemes.kvquant_store import ReferenceTables, SequenceStore
from kvquant.schemes.registry import CacheFactory, ModelShape
from kvquant.study.schemes import KvquantRefScheme


class ReferenceLayer(CacheLayerMixin):
    """A layer of :class:`ReferenceCache`: one store a sequence."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, tables: ReferenceTables, owner: ReferenceCache, number: int) -> None:
        super().__init__()
        self.number = number
        self.tables = tables
        self._owner = owner
        self.stores: list[SequenceStore] = []

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
        full: FullAttention,
    ) -> torch.Tensor:
        """See :meth:`kvquant.cache.block_layer.BlockLayer.attend`."""
        calls = self._owner.calls
        calls.enter(self.number, keys.shape[2])
        out = self._attend(queries, keys, values, rope, scaling, full)
        if calls.leave(self.number):
            self._owner.end_forward()
        return out

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
        full: FullAttention,
    ) -> torch.Tensor:
        """See :meth:`attend`."""
        owner = self._owner
        if owner.counted_rope is not None:
            rope = (owner.counted_rope[0].to(keys.dtype), owner.counted_rope[1].to(keys.dtype))
        turned, queries = rotate(keys, *rope), rotate(queries, *rope)
        simulated = owner.protocol == "B"
        if not simulated and not any(store.length for store in self.stores):
            out = full(queries, turned, values)
            self._append(keys, turned, values)
            return out
        if simulated:
            self._append(keys, turned, values)
        parts = []
        for b, store in enumerate(self.stores):
            positions = owner.query_positions[b : b + 1]
            attention = BlockwiseAttention(queries[b : b + 1], positions, keys.shape[1], scaling)
            for first, k, v, rotated in store.pieces():
                where = slice(first, first + k.shape[2])
                cos, sin = owner.rope_table
                k = k if rotated else rotate(k, cos[:, where], sin[:, where])
                attention.add(k, v, owner.key_positions[:, where] if simulated else None)
            if not simulated:
                seen = owner.new_positions[b : b + 1]
                attention.add(turned[b : b + 1], values[b : b + 1], seen)
            parts.append(attention.result())
        if not simulated:
            self._append(keys, turned, values)
        return torch.cat(parts)

    @torch.inference_mode()
    def _append(self, keys: torch.Tensor, turned: torch.Tensor, values: torch.Tensor) -> None:
        """Packs the call's tokens, one sequence after the other."""
        kind = keys.dtype if keys.dtype is torch.bfloat16 else torch.float16
        self._owner.calls.store()
        with self._owner.measure(keys.device):
            for b, span in enumerate(self._owner.spans):
                k, r, v = (x[b][:, span].to(kind) for x in (keys, turned, values))
                if len(self.stores) <= b:
                    self.stores.append(SequenceStore(self.tables, k))
                self.stores[b].append(k, r, v)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Not available: an attention that does not know the cache would read it wrongly."""
        raise RuntimeError(
            "ReferenceCache needs the attention of kvquant: load the model through "
            "kvquant.models.loading.load_quantized_model"
        )

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first call."""
        return len(self.stores) or -1

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included, as transformers counts."""
        return self._owner.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (older name)."""
        return -1

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Key length and offset for the attention mask of a call with `query_length` columns."""
        if isinstance(query_length, torch.Tensor):
            query_length = query_length.shape[0]
        return self._owner.columns + query_length, 0


class ReferenceCache(Cache, AttendingCache, QuantizeClock, CountedCache):
    """KVQuant's cache (see the module).

    Args:
        tables: One a layer.
        rope: Positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`.
        protocol: As of :class:`kvquant.cache.kvquant_cache.KVQuantCache`.

    Attributes:
        columns: Seen so far in whole calls, padding included.
        calls: Which call runs, and whether one ended early.
        spans: Columns of the current call that are tokens, of each sequence.
    """

    def __init__(self, tables: list[ReferenceTables], rope: Rope, protocol: Protocol = "A") -> None:
        if protocol not in ("A", "B"):
            raise ValueError(f"protocol: must be 'A' or 'B', got {protocol!r}")
        QuantizeClock.__init__(self)
        Cache.__init__(self, layers=[ReferenceLayer(t, self, i) for i, t in enumerate(tables)])
        self.columns = 0
        self.calls = CallRecord()
        self.protocol = protocol
        self._rope = rope
        self.spans: list[Span] = []
        self.query_positions: torch.Tensor
        self.new_positions: torch.Tensor
        self.key_positions: torch.Tensor
        self.rope_table: tuple[torch.Tensor, torch.Tensor]
        # bool [batch_size, columns] on the host; None as long as all are tokens
        self._mask: torch.Tensor | None = None
        self._new_mask: torch.Tensor | None = None
        self._shifts: Shifts | None = None  # of positions, before the first call
        self._new_shifts: Shifts | None = None
        # Of the current call, where the model's positions are shifted
        self.counted_rope: tuple[torch.Tensor, torch.Tensor] | None = None

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
        """See :meth:`AttendingCache.begin_forward`; waits for the device, as the public code does.

        Raises:
            ValueError: The mask contradicts an earlier one, or positions are not counted.
            UserError: An earlier call ended early.
        """
        self.calls.check()
        past = self.columns
        self._new_mask = None
        lengths = [store.length for store in self.layers[0].stores] or [0] * batch
        if len(lengths) != batch:
            raise ValueError(f"input_ids: a batch of {batch}, but the cache holds {len(lengths)}")
        total = past + new_len
        counted = torch.arange(past, total, device=device).expand(batch, -1)
        self.query_positions = self.new_positions = counted
        self.spans = [slice(0, new_len)] * batch
        if mask is None and self._mask is not None:
            raise ValueError("attention_mask: needed for every call of a padded batch")
        if mask is not None:
            if mask.dim() != 2 or tuple(mask.shape) != (batch, total):
                raise ValueError(
                    f"attention_mask: shape {tuple(mask.shape)}, expected {(batch, total)}"
                )
            host = host_mask(mask)
            known = torch.ones_like(host[:, :past]) if self._mask is None else self._mask
            if not torch.equal(host[:, :past], known):
                raise ValueError(
                    "attention_mask: an earlier column was a token and is padding now, or was "
                    "padding and is a token now; keep the earlier columns"
                )
            self._new_mask = None if bool(host.all()) else host
            counts = mask.bool().long().cumsum(1)
            self.query_positions = (counts[:, past:] - 1).clamp(min=0)
            new = mask[:, past:].bool()
            self.new_positions = torch.where(new, self.query_positions, NEVER)
            self.spans = [_span(row) for row in host[:, past:]]
        self._take_positions(positions, given, lengths)
        self.calls.begin(ForwardCall(len(self.layers), new_len, held, lambda: None))
        self.key_positions = torch.arange(total, device=device)[None]
        self.rope_table = self._rope(self.key_positions)

    def _take_positions(
        self, positions: torch.Tensor | None, given: bool, lengths: list[int]
    ) -> None:
        old = self._shifts or Shifts([0] * len(lengths), True)
        self._new_shifts, self.counted_rope = old, None
        if positions is None:
            return
        new = shifts(positions, self.spans, lengths)
        followed = None if new is None else old.follow(new, lengths, given)
        if new is None or followed is None:
            raise ValueError(
                "position_ids: KVQuant's cache counts the tokens of a sequence and takes no "
                "positions that jump; pass attention_mask.cumsum(1) - 1 of the new columns"
            )
        self._new_shifts = followed
        if any(new):
            self.counted_rope = self._rope(self.query_positions)

    def end_forward(self) -> None:
        """See :meth:`AttendingCache.end_forward`."""
        if self.calls.end():
            self.columns += self.query_positions.shape[1]
            self._mask, self._shifts = self._new_mask, self._new_shifts
            self.calls.close()

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
        other.columns, other.rotary = self.columns, self.rotary
        other._mask, other._shifts = self._mask, self._shifts
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.stores = [store.fork() for store in mine.stores]
        return other

    def __copy__(self) -> ReferenceCache:
        """See :meth:`copy`; layers know their cache, so that two cannot share them."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceCache:
        """See :meth:`copy`; the model, whose rotary embedding it holds, is not copied."""
        return self.copy()

    def reset(self) -> None:
        """Forgets everything."""
        self.columns, self.calls = 0, CallRecord()
        self._mask = self._new_mask = self._shifts = self._new_shifts = None
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
