"""Our scheme of allocated codes: widths by sensitivity, rotated values without outliers."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from kvquant.cache.codec import Codec, Packed, check_made_for
from kvquant.errors import UserError
from kvquant.formats.allocated_layer import AllocatedLayer
from kvquant.formats.blocked_sparse import SparseSlab
from kvquant.formats.head_share import HeadShare
from kvquant.formats.mixed_packing import TILE
from kvquant.kernels.allocated_tables import allocated_tables
from kvquant.kernels.cache_shape import LOOKED_UP_BITS, CacheShape
from kvquant.kernels.cuda_expand_allocated import ExpandTables
from kvquant.kernels.decode_tables import HeadTables
from kvquant.kernels.pack_target import PackTarget
from kvquant.quantization.allocated_quant import AllocatedQuantizer
from kvquant.quantization.hadamard import factors
from kvquant.study.schemes import AllocatedScheme

# The kernel's fp16 summand of a channel is at most about this many of its scales away from its
# zero: codes of 4 bits are read as 1 to 2 - 1/16, and their levels are two scales apart at most.
MAX_SUMMAND = 4.0


class AllocatedCodec(Codec):
    """Packs the blocks of one layer with the widths and codebooks of its quantizer file."""

    def __init__(self, spec: AllocatedScheme, layer: AllocatedLayer) -> None:
        self.quantizer = AllocatedQuantizer(
            layer,
            outliers=spec.outliers,
            rotation=spec.rotation,
            per_head=spec.value_range == "token-head",
        )
        self._layer = layer
        self.shape, self.rotates_values = tuple(layer.key_zero.shape), spec.rotation
        self.sinks, self.block_size = spec.sinks, spec.block_size
        self.shared_bytes = self.quantizer.nbytes
        furthest = layer.key_zero.abs() + MAX_SUMMAND * layer.key_scale
        self.narrow_tables = bool((furthest <= torch.finfo(torch.float16).max).all())

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        if head_dim % TILE:
            raise UserError(f"head_dim: {head_dim} is not a multiple of {TILE}, as tiles need")
        if self.rotates_values:
            factors(head_dim)
        check_made_for(self.shape, num_kv_heads, head_dim)

    def cache_shape(
        self, head_dim: int, kv_heads: int, query_heads: int, dtype: torch.dtype
    ) -> CacheShape:
        """See :meth:`Codec.cache_shape`."""
        shape = super().cache_shape(head_dim, kv_heads, query_heads, dtype)
        return replace(
            shape,
            codebook="allocated",
            bits=LOOKED_UP_BITS,
            outliers=self.quantizer.outliers,
            range_per_head=self.quantizer.per_head,
        )

    @functools.cached_property
    def decode_tables(self) -> HeadTables:
        """See :meth:`Codec.decode_tables`."""
        return allocated_tables(self._layer, self.block_size)

    @functools.cached_property
    def past_tables(self) -> ExpandTables:
        """See :meth:`Codec.past_tables`."""
        return ExpandTables(self.decode_tables, self._layer)

    @property
    def key_order(self) -> torch.Tensor:
        """See :meth:`Codec.key_order`."""
        return self.past_tables.key_order

    def keep_share(self, share: HeadShare) -> None:
        """See :meth:`Codec.keep_share`."""
        self.share = self.quantizer.share = share

    def expect_rotated_values(self) -> None:
        """See :meth:`Codec.expect_rotated_values`."""
        self.rotates_values = self.quantizer.rotation = False

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        room = self.reserve(keys.shape[0], keys)
        if room is not None:
            status = torch.zeros(2, dtype=torch.int32, device=keys.device)
            self.pack_into(room, keys, values, status)
            slabs = {
                name: replace(slab, excess=status[0], cursor=None)
                for name, slab in room.sparse.items()
            }
            return Packed(room.dense, slabs, status[1:])
        key_codes, outliers = self.quantizer.pack_keys(keys)
        value_codes, zero, scale = self.quantizer.pack_values(values)
        bad = self.quantizer.not_finite(keys, values) if keys.is_cuda else None
        dense = {"keys": key_codes, "values": value_codes, "zero": zero, "scale": scale}
        return Packed(dense, {} if outliers is None else {"keys": outliers}, bad)

    def widen(self, factor: float) -> None:
        """See :meth:`Codec.widen`."""
        self.quantizer.key_room *= factor

    def reserve(self, blocks: int, like: torch.Tensor) -> Packed | None:
        """See :meth:`Codec.reserve`; only kernels that pack in place have it."""
        if not self.quantizer.kernels(like):
            return None
        _, heads, size, dim = like.shape

        def codes(room: int) -> torch.Tensor:
            return torch.empty((blocks, room), dtype=torch.uint8, device=like.device)

        each = (heads, size) if self.quantizer.per_head else (size,)
        ranges = torch.empty((2, blocks, *each), dtype=like.dtype, device=like.device)
        of_keys, of_values = map(codes, self.quantizer.block_bytes(size))
        dense = {"keys": of_keys, "values": of_values, "zero": ranges[0], "scale": ranges[1]}
        sparse = {}
        if slots := self.quantizer.key_slots(blocks * heads * size * dim):
            shape = (blocks, heads, size, dim)
            sparse["keys"] = SparseSlab.reserve(shape, slots, like.dtype, like.device)
        return Packed(dense, sparse, reserved=True)

    def pack_into(
        self,
        room: Packed,
        keys: torch.Tensor,
        values: torch.Tensor,
        status: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> None:
        """See :meth:`Codec.pack_into`."""
        dense, slab = room.dense, room.sparse.get("keys")
        target = PackTarget(dense["keys"], status)
        if slab is not None:
            target = replace(
                target, begin=slab.begin, count=slab.count, positions=slab.positions,
                values=slab.values, cursor=slab.cursor,
            )  # fmt: skip
        done = self.quantizer.kernel_pack_into(
            keys, values, target, PackTarget(dense["values"], status),
            dense["zero"], dense["scale"], places,
        )  # fmt: skip
        if not done:
            raise RuntimeError("KVQUANT_KERNELS: changed while a cache was in use")

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        dense, size = packed.dense, shape[2]
        return (
            self.quantizer.unpack_keys(dense["keys"], packed.sparse.get("keys"), size),
            self.quantizer.unpack_values(dense["values"], dense["zero"], dense["scale"], size),
        )

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        return self.quantizer.fake_keys(keys), self.quantizer.fake_values(values)


def make_codec(spec: AllocatedScheme, layer: int, tables: AllocatedLayer) -> Codec:
    """Returns the codec of a layer."""
    return AllocatedCodec(spec, tables)
