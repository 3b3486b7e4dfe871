"""The codec interface, which each scheme implements to pack and unpack blocks of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from kvquant.errors import UserError
from kvquant.formats.blocked_sparse import SparseSlab
from kvquant.formats.head_share import HeadShare
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.kernels.cache_shape import CacheShape
from kvquant.kernels.cuda_expand_allocated import ExpandTables
from kvquant.kernels.decode_tables import HeadTables


@dataclass(frozen=True)
class Packed:
    """Blocks in the packed form of a codec.

    Attributes:
        dense: Named tensors `[blocks, ...]` whose other dimensions are the same in every call.
        sparse: Named outliers of the same blocks.
        bad: int32 `[1]`, 1 if the input held NaN or Inf; None if that was checked at once.
        reserved: Whether this is memory that :meth:`Codec.pack_into` fills.
    """

    dense: Mapping[str, torch.Tensor]
    sparse: Mapping[str, SparseSlab] = field(default_factory=dict)
    bad: torch.Tensor | None = None
    reserved: bool = False

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return next((t.shape[0] for t in self.dense.values()), 0)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(t.nbytes for t in self.dense.values()) + sum(
            s.nbytes for s in self.sparse.values()
        )


def check_packable(head_dim: int) -> None:
    """Refuses a model whose heads do not fill whole bytes with codes of any bits.

    Raises:
        UserError: The number of channels per head is not a multiple of 8.
    """
    if head_dim % 8:
        raise UserError(
            f"head_dim: {head_dim} is not a multiple of 8, as packed codes need; use a model with "
            "one, or another scheme"
        )


def check_made_for(found: tuple[int, ...], num_kv_heads: int, head_dim: int) -> None:
    """Refuses a model of another shape than a quantizer was made for.

    Args:
        found: kv heads and channels per head of the quantizer.
        num_kv_heads: Of the model.
        head_dim: Of the model.

    Raises:
        UserError: They differ.
    """
    if found != (num_kv_heads, head_dim):
        raise UserError(
            f"quantizer: made for {found[0]} kv heads of {found[1]}, the model has "
            f"{num_kv_heads} of {head_dim}; calibrate this model"
        )


class Codec(ABC):
    """Packs and unpacks blocks of one layer's keys and values.

    Attributes:
        rotated_keys: Whether keys are stored after RoPE (else before it).
        sinks: Number of first tokens of each sequence that stay 16-bit.
        block_size: Tokens per block.
        residual: Number of most recent tokens that stay 16-bit besides an unfinished block.
        shared_bytes: Bytes of tables that all sequences of the layer share.
        tables: The layer's calibration, if the codec has one.
        rotates_values: Whether values are rotated within their head while they are packed, and back
            when they are read.
        narrow_tables: Whether zeros and scales of the tables fit in fp16, as kernels read them.
        share: Which of the model's kv heads this process has; None: all.
    """

    rotated_keys: bool = False
    sinks: int = 0
    block_size: int = 64
    residual: int = 0
    shared_bytes: int = 0
    tables: LayerQuantizer | None = None
    rotates_values: bool = False
    narrow_tables: bool = True
    share: HeadShare | None = None

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:  # noqa: B027
        """Refuses, at loading time, a model that the codec cannot serve.

        Raises:
            UserError: The model does not fit; the message names the reason.
        """

    def keep_share(self, share: HeadShare) -> None:
        """Prepares for a part of a model's kv heads, for which the tables are already.

        Args:
            share: Which heads these are.
        """
        self.share = share

    def expect_rotated_values(self) -> None:
        """Leaves the rotation of values out, as the model's weights give rotated ones."""
        raise NotImplementedError

    @abstractmethod
    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """Packs blocks of 16-bit keys and values.

        Args:
            keys: fp16/bf16 `[blocks, num_kv_heads, block_size, head_dim]`.
            values: The same shape.
        """

    def reserve(self, blocks: int, like: torch.Tensor) -> Packed | None:
        """Allocates blocks for kernels to fill in place, or returns None where none do.

        After None, arenas store what :meth:`pack` returns.

        Args:
            blocks: Number of blocks.
            like: 16-bit tensor `[blocks, num_kv_heads, block_size, head_dim]` on the device.
        """
        return None

    def pack_into(
        self,
        room: Packed,
        keys: torch.Tensor,
        values: torch.Tensor,
        status: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> None:
        """Packs blocks into a part of the reserved memory.

        Args:
            room: The part of the memory, with as many blocks.
            keys: See :meth:`pack`; with `places` `[batch_size, num_kv_heads, seq_len, head_dim]`.
            values: The same shape.
            places: int32 `[blocks, 2]`, the sequence and the first column of each block; None:
                keys and values are blocks.
            status: int32 `[2]`. The outliers that found no slot are added to the first number, and
                the second becomes 1 if the input held NaN or Inf.
        """
        raise NotImplementedError

    def widen(self, factor: float) -> None:
        """Gives `factor` times the outlier slots to caches made from now on."""
        raise NotImplementedError

    def cache_shape(
        self, head_dim: int, kv_heads: int, query_heads: int, dtype: torch.dtype
    ) -> CacheShape:
        """Returns the properties of a model's cache that decide which kernels can run.

        Args:
            head_dim: Channels per head.
            kv_heads: Key and value heads.
            query_heads: Query heads.
            dtype: Dtype of the 16-bit tokens that the cache holds.
        """
        return CacheShape(
            head_dim=head_dim,
            kv_heads=kv_heads,
            queries_per_kv_head=query_heads // kv_heads,
            dtype=dtype,
            codebook=type(self).__name__,
            block_size=self.block_size,
            sinks=self.sinks,
            narrow_tables=self.narrow_tables,
            rotates_values=self.rotates_values,
            rotated_keys=self.rotated_keys,
        )

    @property
    def decode_tables(self) -> HeadTables:
        """The calibration as the decode kernel reads it, for codecs that have such a kernel."""
        raise NotImplementedError

    @property
    def past_tables(self) -> LayerQuantizer | ExpandTables | None:
        """The calibration as kernels read it that expand a packed past, if there are such."""
        return self.tables

    @property
    def key_order(self) -> torch.Tensor | None:
        """The order in which those kernels write the channels of keys, where it is not their own.

        int32 `[num_kv_heads, head_dim]`.
        """
        return None

    @abstractmethod
    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unpacks blocks to fp32 keys and values of the given shape."""

    @abstractmethod
    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantizes and dequantizes `[n, num_kv_heads, tokens, head_dim]`, any number of tokens.

        What it returns of one of the `n` does not depend on the others.

        Protocol B reads the tokens of an unfinished block this way.
        """
