"""One layer of `KVQuantCache` computes attention over the past and stores new tokens."""

from __future__ import annotations

import torch

from kvquant.cache.attending import AttendingLayer, Extent, FullAttention, NewTokens
from kvquant.cache.block_store import BlockStore
from kvquant.cache.codec import Codec
from kvquant.cache.forward_plan import (
    FirstCall,
    ForwardPlan,
    KernelStep,
    Order,
    PackedPast,
    PastPieces,
)
from kvquant.cache.interface import QuantizeClock
from kvquant.cache.past_pieces import Piece
from kvquant.cache.whole_columns import whole_columns
from kvquant.formats.rope import rotate
from kvquant.kernels.blockwise_attention import BlockwiseAttention
from kvquant.kernels.cuda_decode import decode_attention


class BlockLayer(AttendingLayer[ForwardPlan]):
    """One layer of `KVQuantCache`, whose tensors are held by a :class:`BlockStore`.

    Args:
        codec: The codec that packs and unpacks blocks.
        extent: See :class:`AttendingLayer`.
        clock: See :class:`AttendingLayer`.
        soft_cap: Bound of the scores, by which the hyperbolic tangent squeezes them; None: there is
            none.
    """

    is_croppable = True

    def __init__(
        self,
        codec: Codec,
        extent: Extent,
        clock: QuantizeClock,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(extent, clock)
        self.soft_cap = soft_cap
        self.store = BlockStore(codec)
        self.codec = codec

    def attend(
        self, plan: ForwardPlan, new: NewTokens, scaling: float, full: FullAttention
    ) -> torch.Tensor:
        """Computes attention along the plan's path; see :meth:`AttendingLayer.attend`."""
        if plan.order is Order.APPEND_FIRST:
            self._append(plan, new)
        match plan.path:
            case FirstCall():
                out = full(new.queries, new.rotated_keys, new.values)
            case KernelStep() as step:
                out = self._step(plan, step, new, scaling)
            case PackedPast() as packed:
                out = self._packed(plan, packed, new, scaling, full)
            case PastPieces() as pieces:
                out = self._pieces(plan, pieces, new, scaling, full)
        if plan.order is Order.READ_FIRST:
            self._append(plan, new)
        return out

    def offload(self) -> None:
        """Refuses to offload: packed blocks are small and stay on their device."""
        raise NotImplementedError("offloading: KVQuantCache does not offload its blocks")

    def _step(
        self, plan: ForwardPlan, step: KernelStep, new: NewTokens, scaling: float
    ) -> torch.Tensor:
        """Appends one token per sequence to the tail and attends to all tokens by the kernel."""
        store, tables, queries = self.store, self.codec.decode_tables, new.queries
        assert store.tail is not None and store.sinks is not None
        store.status = plan.status
        arenas = store.arena_table()
        assert arenas is not None
        plan.storing()
        store.check(new.keys, new.values)
        store.write_token(new.keys, new.values, step.places)
        out = decode_attention(
            step.shape, queries[:, :, 0].to(store.tail[0].dtype), store.sinks, store.tail, arenas,
            step.step, tables, scaling, new.sink_logits,
        )  # fmt: skip
        store.pack_full(plan.append)
        return out.to(queries.dtype).unsqueeze(1)

    def _packed(
        self,
        plan: ForwardPlan,
        packed: PackedPast,
        new: NewTokens,
        scaling: float,
        full: FullAttention,
    ) -> torch.Tensor:
        """Computes attention over the packed past by the Triton kernels."""
        if self.store.arena_table() is None:
            return self._pieces(plan, packed.pieces, new, scaling, full)
        past = packed.past if new.rotates else packed.past.unrotated
        if packed.prompt is not None:
            both = None if plan.simulated else (new.rotated_keys, new.values)
            asked = new.queries, plan.query_positions, scaling, both, plan.token_positions
            return past.attend_in_8_bits(self.store, *asked, packed.prompt)
        own = None if plan.simulated else (new.rotated_keys, new.values, plan.token_positions)
        given = new.queries, plan.query_positions, scaling, own
        return past.attend(self.store, *given, sink_logits=new.sink_logits)

    def _pieces(
        self,
        plan: ForwardPlan,
        pieces: PastPieces,
        new: NewTokens,
        scaling: float,
        full: FullAttention,
    ) -> torch.Tensor:
        """Computes attention over the past in PyTorch, piece by piece."""
        cut = pieces.cut()
        if pieces.whole and (cut or not plan.simulated):  # else there are no tokens to read
            kind = new.queries.dtype
            parts = [[x.to(kind) for x in self._read(plan, p, new.rotates)] for p in cut]
            keys, values = ([pair[i] for pair in parts] for i in (0, 1))
            if not plan.whole:
                return full(new.queries, torch.cat(keys, 2), torch.cat(values, 2))
            own = new.rotated_keys, new.values
            k, v, valid = whole_columns(plan, cut, keys, values, own)
            return full(new.queries, k, v, valid=valid, over_past=True)
        heads = new.keys.shape[1]
        attention = BlockwiseAttention(
            new.queries, plan.query_positions, heads, scaling, self.soft_cap, new.sink_logits
        )
        for piece in cut:
            attention.add(*self._read(plan, piece, new.rotates), piece.positions)
        if not plan.simulated:
            attention.add(new.rotated_keys, new.values, plan.new_positions)
        return attention.result()

    def _read(
        self, plan: ForwardPlan, piece: Piece, rotates: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads a piece: rotated keys and values `[batch_size, kv_heads, columns, head_dim]`.

        Args:
            plan: The plan of the call.
            piece: The piece.
            rotates: Whether the layer has RoPE.
        """
        store = self.store
        assert store.sinks is not None
        if piece.part == "sinks":
            keys, values = (x[:, :, : piece.columns] for x in store.sinks)
        elif piece.part == "tail":
            keys, values = store.read_tail(plan.view, fake=plan.simulated)
        else:
            keys, values = self._blocks(piece)
        if rotates and not self.codec.rotated_keys:
            keys = rotate(keys.float(), *piece.rope)
        return keys, values

    def _blocks(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantizes a piece's blocks to `[batch_size, num_kv_heads, columns, head_dim]`."""
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
                gather.put(place, x)
        return out[0].flatten(2, 3), out[1].flatten(2, 3)

    def _append(self, plan: ForwardPlan, new: NewTokens) -> None:
        """Stores the tokens of a call and measures the time it takes."""
        keys = new.rotated_keys if self.codec.rotated_keys else new.keys
        plan.storing()
        self.store.status = plan.status
        with self.clock.measure(keys.device):
            self.store.append(plan.append, keys.detach(), new.values.detach())
