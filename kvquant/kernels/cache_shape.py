"""The properties of a cache that decide which kernels read and write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kvquant.formats.layer_quantizer import outliers_per_side
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.cuda_pack import PackShape
from kvquant.kernels.cuda_pack_allocated import AllocatedPackShape

LOOKED_UP_BITS = 3  # of allocated codes, whose widths are data: the widest keys that are looked up


# How tokens lie in memory that a kernel packs. "pairs": the channels of a head are contiguous, and
# two neighbouring ones can be loaded as one aligned word. "channels": they are only contiguous.
InputLayout = Literal["pairs", "channels", "strided"]


def input_layout(*blocks: torch.Tensor) -> InputLayout:
    """Returns the memory layout that all of these 16-bit blocks `[..., head_dim]` have."""
    if any(x.stride(-1) != 1 for x in blocks):
        return "strided"
    for x in blocks:
        if x.data_ptr() % 4 or any(step % 2 for step in x.stride()[:-1]):
            return "channels"
    return "pairs"


@dataclass(frozen=True)
class CacheShape:
    """The properties of a cache, its model and the current call that decide which kernels apply.

    Attributes:
        head_dim: Channels per head.
        kv_heads: Key and value heads.
        queries_per_kv_head: Query heads that share a key head.
        dtype: Of the 16-bit tokens that the cache holds.
        codebook: How packed codes are read: "nuq" for tables of levels with static key channels and
            online value ranges, "allocated" for codes of allocated widths; any other name is one
            that no kernel reads.
        block_size: Tokens per block.
        bits: Per code of the codebook "nuq"; 3 of "allocated", the widest that is looked up.
        sinks: First tokens of each sequence that stay 16-bit.
        outliers: Fraction of elements that are kept exactly.
        range_per_head: Whether each head of a token's values has a range, in "allocated".
        rotates_values: Whether values are rotated while they are packed, and back when they are
            read.
        rotated_keys: Whether keys are stored after RoPE.
        narrow_tables: Whether the calibration of every layer fits in fp16.
        query_dtype: Of the call's queries; None if it is that of the cache.
        protocol: "A" or "B", see :class:`kvquant.cache.kvquant_cache.KVQuantCache`.
        static_rope: Whether a position is rotated the same way however long the sequence is.
        kept_rope: Whether the cache keeps a rotation per token.
        packed_by_kernels: Whether kernels packed all blocks so far, in place.
        arenas: Arenas that hold the blocks.
        arena_blocks: Blocks of the largest arena.
        input_layout: Of the tokens that are packed.
        soft_cap: Bound of the scores, by which the hyperbolic tangent squeezes them; None: there is
            none.
    """

    head_dim: int
    kv_heads: int
    queries_per_kv_head: int
    dtype: torch.dtype
    codebook: str
    block_size: int
    bits: int = 0
    sinks: int = 0
    outliers: float = 0.0
    range_per_head: bool = False
    rotates_values: bool = False
    rotated_keys: bool = False
    narrow_tables: bool = True
    query_dtype: torch.dtype | None = None
    protocol: str = "A"
    static_rope: bool = True
    kept_rope: bool = False
    packed_by_kernels: bool = True
    arenas: int = 0
    arena_blocks: int = 0
    input_layout: InputLayout = "pairs"
    soft_cap: float | None = None

    @property
    def channels(self) -> int:
        """Channels of a token, all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def outliers_per_side(self) -> int:
        """Exact values at each end of a token's values."""
        return outliers_per_side(self.outliers, self.channels)

    @property
    def decode_shape(self) -> DecodeShape:
        """The constants that kernels which read packed blocks are compiled for."""
        return DecodeShape(
            self.bits,
            self.head_dim,
            self.queries_per_kv_head,
            self.block_size,
            self.dtype,
            self.outliers > 0,
            self.outliers or 0.01,
            allocated=self.codebook == "allocated",
            range_per_head=self.range_per_head,
            soft_cap=self.soft_cap,
        )

    @property
    def pack_shape(self) -> PackShape:
        """The constants that the CUDA kernels which pack blocks are compiled for."""
        return PackShape(
            self.bits,
            self.head_dim,
            self.kv_heads,
            self.block_size,
            self.dtype,
            self.outliers > 0,
            self.outliers_per_side,
        )

    @property
    def allocated_pack_shape(self) -> AllocatedPackShape:
        """The constants that the CUDA kernels which pack allocated codes are compiled for."""
        return AllocatedPackShape(
            self.head_dim,
            self.kv_heads,
            self.block_size,
            self.dtype,
            self.outliers > 0,
            self.range_per_head,
        )

    @property
    def pack_kernel(self) -> PackShape | AllocatedPackShape:
        """The constants of the CUDA kernels that pack blocks of this codebook."""
        return self.allocated_pack_shape if self.codebook == "allocated" else self.pack_shape
