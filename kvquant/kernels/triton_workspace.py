"""The 16-bit workspace that ranges of a packed past are expanded into."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.formats.blocked_sparse import count_dtype, position_dtype
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels import cuda_expand_allocated
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.cuda_expand_allocated import ExpandTables
from kvquant.kernels.triton_expand import _expand, _place_outliers

# To tune: elements of half a tile of one head, heads per program (they share the rotary table of a
# tile), warps, and outliers that a program places at a time.
TILE, HEADS_PER_PROGRAM, EXPAND_WARPS, LANES = 2048, 8, 4, 128


@dataclass(frozen=True)
class Range:
    """Blocks of all sequences that are expanded together; the tail counts as one more block.

    Attributes:
        first: Ordinal of the first block.
        stop: Ordinal behind the last.
        base: Position of the first place of the workspace; the sinks belong to the first range.
        places: Places of the workspace.
    """

    first: int
    stop: int
    base: int
    places: int


@dataclass(frozen=True)
class Held:
    """The 16-bit tokens of one layer, contiguous `[batch_size, num_kv_heads, room, head_dim]`.

    Attributes:
        sinks: Keys before RoPE, and values.
        tail: Keys before RoPE, and values; fp32 where they stand for quantized ones.
    """

    sinks: tuple[torch.Tensor, torch.Tensor]
    tail: tuple[torch.Tensor, torch.Tensor]


class Workspace:
    """The memory that one range after the other is expanded into.

    Args:
        shape: Of the cache.
        batch: Sequences.
        heads: Key heads.
        places: Tokens per sequence.
        dtype: The dtype that attention reads.
        device: Device of the cache.

    Attributes:
        data: `[2, batch_size, num_kv_heads, places, head_dim]`, rotated keys and values. Channels
            of keys with allocated widths lie in the order of their tiles
            (:attr:`~kvquant.kernels.cuda_expand_allocated.ExpandTables.key_order`).
    """

    def __init__(
        self,
        shape: DecodeShape,
        batch: int,
        heads: int,
        places: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = shape
        size = (2, batch, heads, places)
        self.data = torch.empty((*size, shape.head_dim), dtype=dtype, device=device)
        self._words = max(1, shape.head_dim // 32)
        words = self._words if shape.outliers and not shape.allocated else 0
        self._bitmap = torch.empty((*size, words), dtype=torch.int32, device=device)

    def expand(
        self,
        part: Range,
        arenas: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        held: Held,
        tables: LayerQuantizer | ExpandTables,
        rope: tuple[torch.Tensor, torch.Tensor],
        sinks: int,
    ) -> None:
        """Fills the workspace with a range of every sequence; places behind its end stay.

        Args:
            part: The range.
            arenas: int64 `[arenas, len(ARENA_FIELDS)]`, addresses.
            table: int32 `[batch_size, room]`, the number of each block.
            lengths: int32 `[batch_size, 4]`: sinks held, blocks, tokens in the tail, their sum.
            held: The 16-bit tokens.
            tables: Key ranges and codebooks of the layer, as the scheme's kernel reads them.
            rope: fp32 cosine and sine `[positions, head_dim / 2]`, contiguous.
            sinks: Sinks of a long sequence.
        """
        shape = self._shape
        size, dim = shape.block_size, shape.head_dim
        _, batch, heads, places, _ = self.data.shape
        assert part.places <= places
        if isinstance(tables, ExpandTables):
            ordinals = part.first, part.stop
            cuda_expand_allocated.expand(
                shape, self.data, ordinals, part.base, arenas, table, lengths,
                (*held.sinks, *held.tail), tables, rope, sinks,
            )  # fmt: skip
            return
        blocks, bf16 = part.stop - part.first, shape.dtype is torch.bfloat16
        if shape.outliers:
            elements = size * dim
            self._bitmap.zero_()
            _place_outliers[(blocks, 2 * heads, batch)](
                arenas, table, lengths, self.data, self._bitmap, part.first, sinks - part.base,
                places, table.stride(0), heads, size, dim,
                self._words, position_dtype(elements) is torch.int32,
                count_dtype(elements) is torch.int32, bf16, LANES, num_warps=4,
            )  # fmt: skip
        low, longest = part.first, size
        if part.first == 0 and sinks:
            low, longest = -1, max(size, sinks)
        rows = min(64, max(8, 2 * TILE // dim), size)
        tiles = -(-longest // rows)
        each = 1
        while each < HEADS_PER_PROGRAM and heads % (2 * each) == 0:
            each *= 2
        _expand[((part.stop - low) * tiles, heads // each, batch)](
            arenas, table, lengths, *held.sinks, *held.tail, tables.key_scale, tables.key_zero,
            tables.key_levels, tables.value_levels, *rope, self.data, self._bitmap, low, part.base,
            places, tiles, sinks, held.sinks[0].shape[2], held.tail[0].shape[2], table.stride(0),
            heads, each, size, dim, self._words, shape.bits, shape.outliers, bf16,
            rows, num_warps=EXPAND_WARPS, num_stages=1,
        )  # fmt: skip
