"""Stores one layer of one sequence as KVQuant's public code does (see `kvquant_ref`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from kvquant.formats.layer_quantizer import LayerQuantizer, outliers_per_side
from kvquant.formats.packing import pack, unpack
from kvquant.kernels import pytorch_fused as fused
from kvquant.schemes.growing_sparse import PIECE, Compressed
from kvquant.study.schemes import KvquantRefScheme


class ReferenceTables:
    """The calibration of one layer as look-up tables, which all sequences share.

    Args:
        spec: The scheme.
        tables: One layer of the quantizer file, the same that `nuq` reads.
    """

    def __init__(self, spec: KvquantRefScheme, tables: LayerQuantizer) -> None:
        self.bits, self.sinks, self.room = spec.bits, spec.sinks, spec.room
        self.heads, self.dim = tables.key_zero.shape
        self.zero, self.scale = tables.key_zero.reshape(-1), tables.key_scale.reshape(-1)
        self.inverse = fused.channel_inverse(self.scale)
        self.key_levels, self.value_levels = tables.key_levels, tables.value_levels
        # [channels, 2**bits]: one table per channel, as the public code holds them.
        self.key_table = self.key_levels * self.scale[:, None] + self.zero[:, None]
        self.exact_keys = spec.outliers > 0
        self.per_side = outliers_per_side(spec.outliers, self.zero.numel())

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the tables."""
        held = (self.zero, self.scale, self.inverse, self.key_levels, self.value_levels)
        return sum(t.nbytes for t in (*held, self.key_table))


def _encode(normalized: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Returns uint8 codes of the nearest levels, by one kernel on a GPU as in the public code."""
    if normalized.is_cuda:
        return torch.bucketize(normalized, fused.midpoints(levels), out_int32=True).to(torch.uint8)
    return fused.encode(normalized, levels)


class SequenceStore:
    """The stored keys (before RoPE) and values of one sequence in one layer.

    Args:
        tables: The calibration of the layer.
        like: fp16/bf16 `[num_kv_heads, n, head_dim]`; gives device, dtype and first allocation.
    """

    def __init__(self, tables: ReferenceTables, like: torch.Tensor) -> None:
        self.tables = tables
        heads, count, dim = like.shape
        room = max(0, count - tables.sinks) + tables.room
        width = heads * dim * tables.bits // 8
        self.codes = [
            torch.zeros((room, width), dtype=torch.uint8, device=like.device) for _ in range(2)
        ]
        self.value_table = torch.zeros(room, 2**tables.bits, device=like.device)
        self.key_outliers = Compressed.empty(like.device)
        self.value_outliers = Compressed.empty(like.device)
        self.sinks = (like.new_zeros((heads, 0, dim)), like.new_zeros((heads, 0, dim)))
        self.packed = 0

    @property
    def length(self) -> int:
        """Returns the number of tokens."""
        return self.sinks[0].shape[1] + self.packed

    def append(self, keys: torch.Tensor, rotated: torch.Tensor, values: torch.Tensor) -> None:
        """Packs tokens and stores them behind the earlier ones.

        Args:
            keys: fp16/bf16 before RoPE, `[num_kv_heads, n, head_dim]`.
            rotated: The same keys after RoPE, for sinks.
            values: fp16/bf16 of the same shape.
        """
        missing = min(max(self.tables.sinks - self.length, 0), keys.shape[1])
        if missing:
            new = (rotated[:, :missing], values[:, :missing])
            self.sinks = (
                torch.cat([self.sinks[0], new[0]], 1),
                torch.cat([self.sinks[1], new[1]], 1),
            )
            keys, values = keys[:, missing:], values[:, missing:]
        count = keys.shape[1]
        if not count:
            return
        if self.packed + count > self.value_table.shape[0]:
            self._grow(count)
        place = slice(self.packed, self.packed + count)
        self._pack_keys(keys, place)
        self._pack_values(values, place)
        self.packed += count

    def _grow(self, count: int) -> None:
        more = self.packed + count + self.tables.room - self.value_table.shape[0]
        self.codes = [torch.cat([c, c.new_zeros((more, c.shape[1]))]) for c in self.codes]
        table = self.value_table
        self.value_table = torch.cat([table, table.new_zeros((more, table.shape[1]))])

    def _pack_keys(self, keys: torch.Tensor, place: slice) -> None:
        t = self.tables
        rows = (
            keys.float().transpose(0, 1).flatten(1)
        )  # an fp32 copy, transposed to token by channel
        normalized = (rows - t.zero) * t.inverse
        codes = _encode(normalized, t.key_levels)
        self.codes[0][place] = pack(codes, t.bits)
        outside = normalized.abs() > 1.0 if t.exact_keys else torch.zeros_like(codes).bool()
        pointers, found = self.key_outliers.read_count(outside.sum(1, dtype=torch.int32))
        flat = outside.view(-1)
        if flat.is_cuda:  # the buffer's size is known by now, so this does not wait again
            index = torch.nonzero_static(flat, size=found).view(-1)
        else:
            index = flat.nonzero().view(-1)
        channels = index % rows.shape[1]
        # The code of an outlier is the outermost level; the difference from it is stored.
        level = channels * 2**t.bits + codes.view(-1).index_select(0, index)
        rest = rows.view(-1).index_select(0, index) - t.key_table.view(-1).index_select(0, level)
        self.key_outliers.concatenate(pointers, channels.int(), rest)

    def _pack_values(self, values: torch.Tensor, place: slice) -> None:
        t, side, kind = self.tables, self.tables.per_side, values.dtype
        rows = values.float().transpose(0, 1).flatten(1)
        high, low = rows.topk(side + 1, dim=1), rows.topk(side + 1, dim=1, largest=False)
        top, bottom = high.values[:, side:], low.values[:, side:]
        zero = ((top + bottom) * 0.5).to(kind).float()
        scale = ((top - bottom) * 0.5).to(kind).float()
        table = t.value_levels * scale + zero
        self.value_table[place] = table
        codes = _encode((rows - zero) * fused.inverse_range(scale), t.value_levels)
        channels = torch.cat([high.indices[:, :side], low.indices[:, :side]], 1)
        channels = channels.sort(1).values
        middle = 2**t.bits // 2 - 1
        codes.scatter_(1, channels, middle)
        self.codes[1][place] = pack(codes, t.bits)
        counts = torch.full((rows.shape[0],), 2 * side, dtype=torch.int32, device=rows.device)
        pointers, _ = self.value_outliers.read_count(counts)
        rest = rows.gather(1, channels) - table[:, middle : middle + 1]
        self.value_outliers.concatenate(pointers, channels.view(-1).int(), rest.view(-1))

    def pieces(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, bool]]:
        """Yields what is stored, dequantized, as (first position, keys, values, rotated) per piece.

        Keys and values are fp32 `[1, num_kv_heads, n, head_dim]`. `rotated` says that the keys are
        those after RoPE, which is so for sinks only.
        """
        sinks = self.sinks[0].shape[1]
        if sinks:
            yield 0, self.sinks[0][None].float(), self.sinks[1][None].float(), True
        for piece, first in enumerate(range(0, self.packed, PIECE)):
            keys, values = self._unpack(piece, min(self.packed, first + PIECE) - first)
            yield sinks + first, keys, values, False

    def _unpack(self, piece: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        t, place = self.tables, slice(piece * PIECE, piece * PIECE + count)
        size, device = 2**t.bits, self.value_table.device
        parts = []
        for codes, table, rows, outliers in (
            (self.codes[0], t.key_table, False, self.key_outliers),
            (self.codes[1], self.value_table[place], True, self.value_outliers),
        ):
            index = unpack(codes[place], t.bits).int()
            steps = torch.arange(table.shape[0], dtype=torch.int32, device=device) * size
            index += steps[:, None] if rows else steps
            dense = table.reshape(-1).index_select(0, index.view(-1)).view(count, -1)
            outliers.add_to(dense, piece)
            parts.append(dense.view(1, count, t.heads, t.dim).transpose(1, 2))
        return parts[0], parts[1]

    def fork(self) -> SequenceStore:
        """Returns an independent copy."""
        other = copy.copy(self)
        other.codes = [c.clone() for c in self.codes]
        other.value_table = self.value_table.clone()
        # Arrays that grow by concatenation are never written in place.
        for name in ("key_outliers", "value_outliers"):
            mine = copy.copy(getattr(self, name))
            mine.marks = list(mine.marks)
            setattr(other, name, mine)
        return other

    @property
    def nbytes(self) -> int:
        """Returns the bytes that are allocated, without the shared tables."""
        dense = sum(t.nbytes for t in (*self.codes, *self.sinks, self.value_table))
        return dense + self.key_outliers.nbytes + self.value_outliers.nbytes
