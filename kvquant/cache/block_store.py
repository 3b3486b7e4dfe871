"""A block store holds one layer's tensors: 16-bit sinks, packed blocks and 16-bit tails.

It serves ragged batches. :mod:`kvquant.cache.layout` decides for all layers at once where tokens
go, and this module moves the data. An append writes into memory that is already there or into a new
arena: nothing stored is copied or moved, and the host never waits for the device. Memory that no
sequence needs any more is freed when sequences are cropped or selected
(:meth:`BlockStore.reclaim`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvquant.cache.append_plan import AppendPlan, View, WholeCall, copy_columns
from kvquant.cache.arena import NO_ARENA, Arena
from kvquant.cache.codec import Codec, Packed
from kvquant.cache.incoming import fill_blocks, refuse_changed, refuse_infinite
from kvquant.cache.reclaim import Reclaim
from kvquant.errors import UserError
from kvquant.formats.blocked_sparse import Index, SparseSlab
from kvquant.kernels.arena_table import ARENA_FIELDS
from kvquant.kernels.block_places import block_count, gathered

ARENA_ROOM = 64  # initial rows of the kernels' table of arenas


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the 16-bit dtype in which sinks and tails hold tokens of a dtype."""
    return dtype if dtype is torch.bfloat16 else torch.float16


class BlockStore:
    """Holds the keys and values of one layer.

    Args:
        codec: The codec that packs and unpacks blocks.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.arenas: list[Arena] = []
        self.sinks: tuple[torch.Tensor, torch.Tensor] | None = None
        self.tail: tuple[torch.Tensor, torch.Tensor] | None = None
        # int32 [2], shared by the layers of a cache on a GPU: outliers lost, NaN or Inf seen
        self.status: torch.Tensor | None = None
        self._reserved = True  # whether all arenas are, so that kernels can read them
        self._arena_table: tuple[int, torch.Tensor] | None = None
        self._kinds: tuple[torch.dtype, torch.dtype] | None = None  # dtypes of the first input

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads; 0 before the first token is stored."""
        return 0 if self.tail is None else self.tail[0].shape[1]

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Refuses tokens whose shape, device or dtype differs from that of the stored ones.

        Raises:
            UserError: Something differs; the message names it. Nothing is converted silently.
        """
        if keys.shape != values.shape:
            raise UserError(
                f"values: shape {tuple(values.shape)}, but keys have {tuple(keys.shape)}; a cache "
                "of packed blocks needs heads of one size"
            )
        kinds = (keys.dtype, values.dtype)
        if self._kinds is None:
            self._kinds = kinds
        if self.tail is None:
            return
        batch, heads, _, dim = self.tail[0].shape
        found = (keys.shape[0], keys.shape[1], keys.shape[3], keys.device, *kinds)
        held = (batch, heads, dim, self.tail[0].device, *self._kinds)
        names = ("sequences", "kv heads", "head_dim", "device", "dtype of keys", "dtype of values")
        refuse_changed(names, held, found)

    def _allocate(self, keys: torch.Tensor) -> None:
        batch, heads, _, dim = keys.shape
        counts = (self.codec.sinks, self.codec.residual + self.codec.block_size)
        sizes = [batch * heads * n * dim for n in counts for _ in "kv"]
        # One array, because each fill costs the host a launch.
        kind = stored_dtype(keys.dtype)
        parts = torch.zeros(sum(sizes), dtype=kind, device=keys.device).split(sizes)
        k0, v0, k1, v1 = (part.view(batch, heads, -1, dim) for part in parts)
        self.sinks, self.tail = (k0, v0), (k1, v1)

    @torch.inference_mode()  # buffers are inference tensors, whatever mode the caller is in
    def append(self, plan: AppendPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores the tokens of a call.

        Args:
            plan: The plan of :meth:`kvquant.cache.layout.Layout.append`.
            keys: `[batch_size, num_kv_heads, new_len, head_dim]`, padding included; before or after
                RoPE as the codec says.
            values: The same shape.
        """
        self.check(keys, values)
        if self.tail is None:
            self._allocate(keys)
        assert self.tail is not None and self.sinks is not None
        kind = self.tail[0].dtype
        keys, values = keys.to(kind), values.to(kind)
        if keys.device.type == "cpu":  # on a GPU this check would wait for the device
            refuse_infinite(plan.spans, keys, values)
        if plan.decode and keys.shape[2] == 1:
            self._append_step(plan, keys, values)
        else:
            self._append_many(plan, keys, values)

    def _append_step(self, plan: AppendPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores one token per sequence and packs the blocks that became full."""
        places = plan.before.tails
        at: int | torch.Tensor = places[0]
        if len(set(places)) > 1:
            at = torch.tensor(places).to(keys.device, non_blocking=True)
        self.write_token(keys, values, at)
        self.pack_full(plan)

    @torch.inference_mode()
    def write_token(self, keys: torch.Tensor, values: torch.Tensor, at: int | torch.Tensor) -> None:
        """Writes one token per sequence into the tails.

        Args:
            keys: `[batch_size, num_kv_heads, 1, head_dim]`.
            values: The same shape.
            at: Place in the tail, or int64 `[batch_size]` on the device.
        """
        assert self.tail is not None
        for buffer, x in zip(self.tail, (keys, values), strict=True):
            if isinstance(at, int):
                buffer[:, :, at : at + 1] = x
            else:
                index = at.view(-1, 1, 1, 1).expand(-1, buffer.shape[1], 1, buffer.shape[3])
                buffer.scatter_(2, index, x.to(buffer.dtype))

    def pack_full(self, plan: AppendPlan) -> None:
        """Packs the oldest block of each tail that the step filled."""
        if plan.arena >= 0:
            self._pack_full(plan)

    @torch.inference_mode()
    def _pack_full(self, plan: AppendPlan) -> None:
        assert self.tail is not None
        batch = self.tail[0].shape[0]
        full = [b for b in range(batch) if plan.new_blocks(b)]
        size, residual = self.codec.block_size, self.codec.residual
        chosen: Index = slice(None)
        if len(full) < batch:
            chosen = torch.tensor(full).to(self.tail[0].device, non_blocking=True)
        rows = [buffer[chosen] for buffer in self.tail]
        self._pack(plan, rows[0][:, :, :size], rows[1][:, :, :size])
        if residual:
            for buffer, x in zip(self.tail, rows, strict=True):
                # the source may overlap its destination
                buffer[chosen, :, :residual] = x[:, :, size : size + residual].clone()

    def _append_many(self, plan: AppendPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores chunks of any length, with or without padding."""
        assert self.tail is not None and self.sinks is not None
        whole = plan.whole_call(keys.device, self.codec.sinks, self.codec.block_size)
        if whole is not None:
            self._append_whole(plan, whole, keys, values)
            return
        size, heads, dim = self.codec.block_size, keys.shape[1], keys.shape[3]
        total = sum(plan.new_blocks(b) for b in range(len(plan.spans)))
        staged = (
            keys.new_empty((total, heads, size, dim)),
            values.new_empty((total, heads, size, dim)),
        )
        at = 0
        for b, span in enumerate(plan.spans):
            length, tail = plan.before.lengths[b], plan.before.tails[b]
            blocks = plan.new_blocks(b)
            for x, sinks, buffer, out in zip(
                (keys, values), self.sinks, self.tail, staged, strict=True
            ):
                new = x[b][:, span]
                if length < self.codec.sinks:
                    count = min(self.codec.sinks - length, new.shape[1])
                    sinks[b, :, length : length + count] = new[:, :count]
                    new = new[:, count:]
                if not blocks:
                    buffer[b, :, tail : tail + new.shape[1]] = new
                    continue
                region = out[at : at + blocks]
                old = min(tail, blocks * size)  # tail tokens that go into blocks
                fill_blocks(region, 0, buffer[b, :, :old])
                taken = blocks * size - old
                fill_blocks(region, old, new[:, :taken])
                if old < tail:
                    buffer[b, :, : tail - old] = buffer[b, :, old:tail].clone()
                buffer[b, :, tail - old : plan.after.tails[b]] = new[:, taken:]
            at += blocks
        if total:
            self._pack(plan, staged[0], staged[1])

    def _append_whole(
        self, plan: AppendPlan, whole: WholeCall, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Stores the sequences of a call without old tails, all at once."""
        assert self.tail is not None and self.sinks is not None
        for x, sinks, tail in zip((keys, values), self.sinks, self.tail, strict=True):
            if whole.sinks is not None:
                copy_columns(x, whole.sinks, sinks[:, :, sinks.shape[2] - whole.sinks.shape[1] :])
            if whole.tail is not None:
                copy_columns(x, whole.tail, tail[:, :, : whole.tail.shape[1]])
        if whole.places is not None:
            self._pack(plan, keys, values, places=whole.places)

    def _pack(
        self,
        plan: AppendPlan,
        keys: torch.Tensor,
        values: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> None:
        """Packs blocks `[blocks, num_kv_heads, block_size, head_dim]` into the plan's arena.

        With `places` (see :meth:`Codec.pack_into`), keys and values are those of the whole call.
        """
        packed, size = None, self.codec.block_size

        def pack() -> Packed:
            return self.codec.pack(*(gathered(x, places, size) for x in (keys, values)))

        if plan.capacity:
            first = self.codec.reserve(plan.capacity, keys[:, :, :size])
            if first is None:
                first = packed = pack()
            self._set_arena(plan.arena, Arena(plan.capacity, first))
        arena = self.arenas[plan.arena]
        if arena.reserved:
            if self.status is None:  # a store that belongs to no cache
                self.status = torch.zeros(2, dtype=torch.int32, device=keys.device)
            room = arena.view(slice(plan.at, plan.at + block_count(keys, places)))
            self.codec.pack_into(room, keys, values, self.status, places)
            return
        packed = packed or pack()
        arena.put(plan.at, packed)
        if self.status is not None:
            for slab in packed.sparse.values():
                if slab.excess is not None:
                    self.status[0] += slab.excess
            if packed.bad is not None:
                self.status[1] |= packed.bad[0]

    def _set_arena(self, number: int, arena: Arena) -> None:
        self.arenas += [NO_ARENA] * (number - len(self.arenas))
        self.arenas[number : number + 1] = [arena]
        self._reserved = all(a.reserved for a in self.arenas)
        if self._arena_table is not None:  # the row is rewritten before the table is read
            self._arena_table = (min(number, self._arena_table[0]), self._arena_table[1])

    @torch.inference_mode()
    def reclaim(self, change: Reclaim) -> None:
        """Frees and compacts arenas.

        Args:
            change: The change that :meth:`kvquant.cache.layout.Layout.reclaim` returned.
        """
        for number, used in change.rewound:
            self.arenas[number].rewind(used)
        for move in change.moves:
            sources = [(self.arenas[number], places) for number, places in move.sources]
            self._set_arena(move.arena, Arena.gather(sources))
        for number in change.freed:
            self._set_arena(number, NO_ARENA)

    def crowding(self) -> float:
        """Returns outliers over outlier slots of the fullest arena; waits for the device."""
        return max((s.crowding() for a in self.arenas for s in a.sparse.values()), default=0.0)

    @property
    def packed_by_kernels(self) -> bool:
        """Whether kernels packed all blocks in place, so that kernels can read them."""
        return self._reserved

    def arena_table(self) -> torch.Tensor | None:
        """Returns the table of arena addresses, or None where kernels cannot read the arenas.

        It is int64 `[room, fields]`. The same tensor is returned as long as it has a row for each
        arena, so that a captured graph stays valid.
        """
        if self.tail is None or not self._reserved:
            return None
        count = len(self.arenas)
        if self._arena_table is None or self._arena_table[1].shape[0] < count:
            shape = (max(ARENA_ROOM, 2 * count), len(ARENA_FIELDS))
            with torch.inference_mode(False):  # steps outside inference mode write to it, too
                table = torch.zeros(shape, dtype=torch.int64, device=self.tail[0].device)
            self._arena_table = (0, table)
        done, table = self._arena_table
        if done < count:
            rows = torch.tensor([a.addresses for a in self.arenas[done:]], dtype=torch.int64)
            table[done:count].copy_(rows, non_blocking=True)
            self._arena_table = (count, table)
        return table

    def unpack(self, arena: int, blocks: Index) -> tuple[torch.Tensor, torch.Tensor]:
        """Unpacks blocks to fp32 keys and values `[n, kv_heads, block_size, head_dim]` each."""
        assert self.tail is not None
        packed = self.arenas[arena].view(blocks)
        heads, dim = self.tail[0].shape[1], self.tail[0].shape[3]
        return self.codec.unpack(packed, (packed.blocks, heads, self.codec.block_size, dim))

    def read_tail(self, view: View, *, fake: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads keys and values of the tails, padded to the longest one.

        Args:
            view: The state whose tails are read.
            fake: Whether to quantize and dequantize them (protocol B).

        Returns:
            Keys and values, `[batch_size, num_kv_heads, longest tail, head_dim]` each.
        """
        assert self.tail is not None
        longest = max(view.tails)
        keys, values = (buffer[:, :, :longest] for buffer in self.tail)
        if not fake:
            return keys, values
        if longest and min(view.tails) == longest:  # as in windows of a text
            return self.codec.fake(keys, values)
        out = (keys.float(), values.float())
        for b, tail in enumerate(view.tails):
            if tail:
                parts = self.codec.fake(keys[b : b + 1, :, :tail], values[b : b + 1, :, :tail])
                for x, part in zip(out, parts, strict=True):
                    x[b, :, :tail] = part[0]
        return out

    def outliers(self, name: str, table: list[tuple[int, int]]) -> list[SparseSlab]:
        """Returns the outliers ("keys" or "values") of a sequence, one slab per block."""
        return [
            self.arenas[arena].sparse[name].view(slice(place, place + 1))
            for arena, place in table
            if name in self.arenas[arena].sparse
        ]

    @torch.inference_mode()
    def select(self, indices: torch.Tensor) -> None:
        """Keeps or repeats the 16-bit tokens of the given sequences."""
        if self.tail is not None and self.sinks is not None:
            where = indices.to(self.tail[0].device)
            self.sinks = (self.sinks[0][where], self.sinks[1][where])
            self.tail = (self.tail[0][where], self.tail[1][where])

    @torch.inference_mode()
    def take_over(self, others: Sequence[BlockStore], offsets: Sequence[int]) -> None:
        """Appends the sequences of other stores; packed blocks stay where they are.

        Args:
            others: Stores of the same codec and kind of tokens, which must not be used again.
            offsets: What :meth:`kvquant.cache.layout.Layout.take_over` returned.
        """
        stores = [self, *others]
        pairs = [(s.sinks, s.tail) for s in stores if s.sinks is not None and s.tail is not None]
        sinks, tails = zip(*pairs, strict=True)
        self.sinks = (torch.cat([x[0] for x in sinks]), torch.cat([x[1] for x in sinks]))
        self.tail = (torch.cat([x[0] for x in tails]), torch.cat([x[1] for x in tails]))
        for other, offset in zip(others, offsets, strict=True):
            for number, arena in enumerate(other.arenas):
                self._set_arena(offset + number, arena)

    @torch.inference_mode()
    def uncut(self, cuts: list[tuple[int, int, int] | None]) -> None:
        """Dequantizes the kept tokens of blocks that a crop cut and moves them to the tail."""
        if self.tail is None:
            return
        for b, cut in enumerate(cuts):
            if cut is not None:
                arena, place, tokens = cut
                both = self.unpack(arena, slice(place, place + 1))
                for buffer, x in zip(self.tail, both, strict=True):
                    buffer[b, :, :tokens] = x[0, :, :tokens].to(buffer.dtype)

    @torch.inference_mode()
    def fork(self) -> BlockStore:
        """Returns a copy that shares the packed blocks."""
        other = BlockStore(self.codec)
        other.arenas, other._kinds = list(self.arenas), self._kinds
        other._reserved = self._reserved
        if self.tail is not None and self.sinks is not None:
            other.sinks = (self.sinks[0].clone(), self.sinks[1].clone())
            other.tail = (self.tail[0].clone(), self.tail[1].clone())
        return other

    @property
    def nbytes(self) -> int:
        """The bytes allocated for sinks, tails with their slack, arenas and shared tables."""
        if self.tail is None or self.sinks is None:
            return 0
        buffers = sum(t.nbytes for t in (*self.sinks, *self.tail))
        return buffers + sum(a.nbytes for a in self.arenas) + self.codec.shared_bytes
