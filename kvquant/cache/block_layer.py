"""A layer of `KVQuantCache`: attention of a call over the past, and storing what is new."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec
from kvquant.cache.layout import AppendPlan
from kvquant.cache.past_pieces import Piece
from kvquant.formats.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix
from kvquant.formats.rope import rotate
from kvquant.kernels.blockwise_attention import BlockwiseAttention
from kvquant.kernels.cuda_decode import DecodeShape, decode_attention

if TYPE_CHECKING:
    from kvquant.cache.kvquant_cache import KVQuantCache

FullAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class BlockLayer(CacheLayerMixin):
    """A layer of `KVQuantCache`; its tensors live in a :class:`BlockStore`."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, codec: Codec, owner: KVQuantCache, number: int) -> None:
        super().__init__()
        self.number = number
        self.store = BlockStore(codec)
        self.codec = codec
        self._owner = owner

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the store allocates on its first append."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Not available: an attention that does not know the cache would read it wrongly."""
        raise RuntimeError(
            "KVQuantCache needs the attention of kvquant: load the model through "
            "kvquant.models.loading.load_quantized_model"
        )

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
        full: FullAttention,
    ) -> torch.Tensor:
        """Attention of a call's queries; stores the call's keys and values.

        Args:
            queries: Before RoPE, `[batch_size, num_heads, new_len, head_dim]`.
            keys: New keys before RoPE, `[batch_size, num_kv_heads, new_len, head_dim]`.
            values: New values, the same shape.
            rope: Rotary table of the new tokens, `[batch_size, new_len, head_dim]` each.
            scaling: Factor of the scores.
            full: Attention of rotated queries, keys and values of this call alone, causal and
                masked; used where there is no past to read, or it is what this call just stored.

        Returns:
            `[batch_size, new_len, num_heads, head_dim]`.
        """
        rope = self._owner.enter(self.number, queries, keys, rope)
        out = self._attend(queries, keys, values, rope, scaling, full)
        self._owner.leave(self.number)
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
        owner, plan = self._owner, self._owner.plan
        turned = rotate(keys, *rope)
        stored = turned if self.codec.rotated_keys else keys
        queries = rotate(queries, *rope)
        simulated = owner.protocol == "B"
        if owner.steps is not None:
            return self._step(queries, keys, values, scaling)
        if not simulated and not any(plan.before.lengths):
            self._append(plan, stored, values)
            return full(queries, turned, values)
        if simulated:
            self._append(plan, stored, values)
        past = owner.past(queries)
        if past is not None and self.store.arena_table() is not None:
            own = None if simulated else (turned, values, owner.token_positions())
            out = past.attend(self.store, queries, owner.query_positions, scaling, own)
            if not simulated:
                self._append(plan, stored, values)
            return out
        if simulated and owner.starts_whole(keys):
            parts = [self._read(piece, simulated) for piece in owner.pieces(queries.shape)]
            return full(
                queries, *(torch.cat(x, 2).to(queries.dtype) for x in zip(*parts, strict=True))
            )
        attention = BlockwiseAttention(queries, owner.query_positions, keys.shape[1], scaling)
        for piece in owner.pieces(queries.shape):
            attention.add(*self._read(piece, simulated), piece.positions)
        if not simulated:
            attention.add(turned, values, owner.new_positions)
            self._append(plan, stored, values)
        return attention.result()

    def _step(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """A token a sequence by the kernel: it joins the tail, and all is read from there."""
        owner, store = self._owner, self.store
        steps, tables = owner.steps, self.codec.decode_tables
        assert steps is not None and store.tail is not None and store.sinks is not None
        store.status = owner.status(keys.device)
        arenas = store.arena_table()
        assert arenas is not None and tables is not None
        owner.calls.store()
        store.check(keys, values)
        store.write_token(keys, values, owner.step_places)
        out = decode_attention(
            steps.shape, queries[:, :, 0].to(store.tail[0].dtype), store.sinks, store.tail, arenas,
            owner.step, tables, scaling,
        )  # fmt: skip
        if not owner.captured:
            store.pack_full(owner.plan)
        return out.to(queries.dtype).unsqueeze(1)

    def _read(self, piece: Piece, simulated: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys and values of a piece, `[batch_size, num_kv_heads, columns, head_dim]`."""
        store, plan = self.store, self._owner.plan
        assert store.sinks is not None
        if piece.part == "sinks":
            keys, values = (x[:, :, : piece.columns] for x in store.sinks)
        elif piece.part == "tail":
            view = plan.after if simulated else plan.before
            keys, values = store.read_tail(view, fake=simulated)
        else:
            keys, values = self._blocks(piece)
        if not self.codec.rotated_keys:
            keys = rotate(keys.float(), *piece.rope)
        return keys, values

    def _blocks(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized blocks `[batch_size, num_kv_heads, columns, head_dim]`."""
        store, size = self.store, self.codec.block_size
        assert store.tail is not None
        batch, heads, _, dim = store.tail[0].shape
        if batch == 1 and len(piece.gathers) == 1:
            both = store.unpack(piece.gathers[0].arena, piece.gathers[0].blocks)
            keys, values = (x.transpose(0, 1).reshape(1, heads, -1, dim) for x in both)
            return keys, values
        shape = (batch, heads, piece.columns // size, size, dim)
        out = (store.tail[0].new_zeros(shape, dtype=torch.float32),) * 2
        out = (out[0], torch.zeros_like(out[0]))
        for gather in piece.gathers:
            both = store.unpack(gather.arena, gather.blocks)
            for place, x in zip(out, both, strict=True):
                place[gather.sequences, :, gather.ordinals] = x
        return out[0].flatten(2, 3), out[1].flatten(2, 3)

    def _append(self, plan: AppendPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
        owner = self._owner
        owner.calls.store()
        keys, values = keys.detach(), values.detach()
        self.store.status = owner.status(keys.device)
        if owner.timed and keys.is_cuda:
            torch.cuda.synchronize(keys.device)
        start = time.perf_counter()
        self.store.append(plan, keys, values)
        if owner.timed and keys.is_cuda:
            torch.cuda.synchronize(keys.device)
        owner.quantize_seconds += time.perf_counter() - start

    def decode_shape(self, query_heads: int) -> DecodeShape | None:
        """What kernels that read the past are compiled for; None where none reads it."""
        tail = self.store.tail
        if tail is None:
            return None
        _, heads, _, dim = tail[0].shape
        return self.codec.decode_shape(dim, query_heads // heads, tail[0].dtype)

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first call."""
        return self._owner.batch_size

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

    def offload(self) -> None:
        """Refused: packed blocks are small and stay on their device."""
        raise NotImplementedError("offloading: KVQuantCache does not offload its blocks")

    @property
    def key_outliers(self) -> list[BlockedCSCMatrix]:
        """Exact key outliers in packed blocks, one matrix a sequence."""
        tables = self._owner.layout.table
        return [BlockedCSCMatrix(self.store.outliers("keys", t)) for t in tables]

    @property
    def value_outliers(self) -> list[BlockedCSRMatrix]:
        """Exact value outliers in packed blocks, one matrix a sequence."""
        tables = self._owner.layout.table
        return [BlockedCSRMatrix(self.store.outliers("values", t)) for t in tables]
