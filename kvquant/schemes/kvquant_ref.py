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

from kvquant.attention import NEVER, BlockwiseAttention
from kvquant.block_layer import FullAttention
from kvquant.cache import Protocol
from kvquant.cache_interface import AttendingCache, CountedCache, QuantizeClock
from kvquant.layout import Span
from kvquant.rope import Rope, rotate
from kvquant.schemes.kvquant_store import ReferenceTables, SequenceStore


class ReferenceLayer(CacheLayerMixin):
    """A layer of :class:`ReferenceCache`: one store a sequence."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, tables: ReferenceTables, owner: ReferenceCache) -> None:
        super().__init__()
        self.tables = tables
        self._owner = owner
        self.stores: list[SequenceStore] = []
        self.columns = 0

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
        full: FullAttention,
    ) -> torch.Tensor:
        """See :meth:`kvquant.block_layer.BlockLayer.attend`."""
        owner = self._owner
        self.columns += keys.shape[2]
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
            "kvquant.models.load_quantized_model"
        )

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first call."""
        return len(self.stores) or -1

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included, as transformers counts."""
        return self.columns

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
        return self.columns + query_length, 0


class ReferenceCache(Cache, AttendingCache, QuantizeClock, CountedCache):
    """KVQuant's cache (see the module).

    Args:
        tables: One a layer.
        rope: Positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`.
        protocol: As of :class:`kvquant.cache.KVQuantCache`.

    Attributes:
        spans: Columns of the current call that are tokens, of each sequence.
    """

    def __init__(self, tables: list[ReferenceTables], rope: Rope, protocol: Protocol = "A") -> None:
        if protocol not in ("A", "B"):
            raise ValueError(f"protocol: must be 'A' or 'B', got {protocol!r}")
        QuantizeClock.__init__(self)
        Cache.__init__(self, layers=[ReferenceLayer(t, self) for t in tables])
        self.protocol = protocol
        self._rope = rope
        self.spans: list[Span] = []
        self.query_positions: torch.Tensor
        self.new_positions: torch.Tensor
        self.key_positions: torch.Tensor
        self.rope_table: tuple[torch.Tensor, torch.Tensor]
        self._padded = False

    def begin_forward(
        self, batch: int, new_len: int, mask: torch.Tensor | None, device: torch.device
    ) -> None:
        """See :meth:`AttendingCache.begin_forward`."""
        past = self.get_seq_length()
        total = past + new_len
        positions = torch.arange(past, total, device=device).expand(batch, -1)
        self.query_positions = self.new_positions = positions
        self.spans = [slice(0, new_len)] * batch
        if mask is None and self._padded:
            raise ValueError("attention_mask: needed for every call of a padded batch")
        if mask is not None:
            if mask.dim() != 2 or tuple(mask.shape) != (batch, total):
                raise ValueError(
                    f"attention_mask: shape {tuple(mask.shape)}, expected {(batch, total)}"
                )
            counts = mask.long().cumsum(1)
            self.query_positions = (counts[:, past:] - 1).clamp(min=0)
            new = mask[:, past:].bool()
            self.new_positions = torch.where(new, self.query_positions, NEVER)
            if new_len > 1 or not mask.is_cuda:  # a decode step has one token a sequence
                self.spans = [_span(row) for row in new.cpu()]
                self._padded |= not bool(new.all())
        self.key_positions = torch.arange(total, device=device)[None]
        self.rope_table = self._rope(self.key_positions)

    def _choose(self, order: list[int]) -> None:
        for layer in self.layers:
            used: set[int] = set()
            stores = []
            for i in order:
                stores.append(layer.stores[i].fork() if i in used else layer.stores[i])
                used.add(i)
            layer.stores = stores

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences for beam search."""
        self._choose(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences (int64 indices or a bool mask)."""
        chosen = indices.nonzero().view(-1) if indices.dtype is torch.bool else indices
        self._choose(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
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
