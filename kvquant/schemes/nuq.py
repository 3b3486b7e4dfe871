"""Our scheme, with non-uniform codes, exact outliers and keys stored before RoPE.

KVQuant (arXiv 2401.18079) argues for keys before RoPE, whose channels have ranges that do not
depend on the position. With `keys: after-rope` they are stored after RoPE, with ranges and
codebooks that calibration fitted to rotated keys: packing is the same, and the PyTorch path reads
them as they lie. No kernel does, as kernels rotate the keys that they read.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from kvquant.cache.codec import Codec, Packed, check_made_for, check_packable
from kvquant.errors import UserError
from kvquant.formats.blocked_sparse import SparseSlab
from kvquant.formats.head_share import HeadShare
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.packing import packed_bytes
from kvquant.kernels.cache_shape import CacheShape
from kvquant.kernels.decode_tables import HeadTables
from kvquant.kernels.pack_target import PackTarget
from kvquant.quantization.batched_quant import BatchedKVQuantizer, PackedKeys, PackedValues
from kvquant.quantization.block_input import not_finite
from kvquant.study.schemes import NuqScheme

MAX_CHANNELS = 1 << 16  # of a token, among which the largest elements can be found


class NuqCodec(Codec):
    """Packs the blocks of one layer with the tables of its quantizer file."""

    def __init__(self, spec: NuqScheme, tables: LayerQuantizer) -> None:
        self.rotated_keys = spec.keys_after_rope
        self.quantizer = BatchedKVQuantizer(tables, spec.bits, spec.outliers)
        self.sinks = spec.sinks
        self.block_size = spec.block_size
        self.shared_bytes = tables.nbytes
        self.tables = tables
        furthest = tables.key_zero.abs() + tables.key_scale
        self.narrow_tables = bool((furthest <= torch.finfo(torch.float16).max).all())

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        check_packable(head_dim)
        heads = num_kv_heads if self.share is None else self.share.heads
        if heads * head_dim > MAX_CHANNELS:
            raise UserError(
                f"num_kv_heads: {heads} of {head_dim} are more than {MAX_CHANNELS} channels"
            )
        assert self.tables is not None
        check_made_for(tuple(self.tables.key_zero.shape), num_kv_heads, head_dim)

    def keep_share(self, share: HeadShare) -> None:
        """See :meth:`Codec.keep_share`."""
        self.share = self.quantizer.share = share

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        bad = None
        packed = self.quantizer.kernel_pack(keys, values)
        if packed is None:
            k, v = self.quantizer.pack_keys(keys), self.quantizer.pack_values(values)
            bad = not_finite(keys, values) if keys.is_cuda else None
        else:
            k, v, bad = packed
        dense = {"keys": k.codes, "values": v.codes, "zero": v.zero, "scale": v.scale}
        sparse = {
            name: slab
            for name, slab in (("keys", k.outliers), ("values", v.outliers))
            if slab is not None
        }
        return Packed(dense, sparse, bad)

    def cache_shape(
        self, head_dim: int, kv_heads: int, query_heads: int, dtype: torch.dtype
    ) -> CacheShape:
        """See :meth:`Codec.cache_shape`."""
        shape = super().cache_shape(head_dim, kv_heads, query_heads, dtype)
        bits, outliers = self.quantizer.bits, self.quantizer.outliers
        return replace(shape, codebook="nuq", bits=bits, outliers=outliers)

    @functools.cached_property
    def decode_tables(self) -> HeadTables:
        """See :meth:`Codec.decode_tables`."""
        return HeadTables.make(self.quantizer.tables)

    def widen(self, factor: float) -> None:
        """See :meth:`Codec.widen`."""
        self.quantizer.key_room *= factor

    def reserve(self, blocks: int, like: torch.Tensor) -> Packed | None:
        """See :meth:`Codec.reserve`; only kernels that pack in place have it."""
        if self.quantizer.backend(like, like) not in ("cuda", "triton"):
            return None
        _, heads, size, dim = like.shape
        shape = (blocks, heads, size, dim)
        room = size * packed_bytes(dim, self.quantizer.bits)
        codes = torch.empty((2, blocks, heads, room), dtype=torch.uint8, device=like.device)
        ranges = torch.empty((2, blocks, size), dtype=like.dtype, device=like.device)
        dense = {"keys": codes[0], "values": codes[1], "zero": ranges[0], "scale": ranges[1]}
        slots = {
            "keys": self.quantizer.key_slots(blocks * heads * size * dim),
            "values": self.quantizer.value_slots(blocks * size, heads * dim),
        }
        sparse = {
            name: SparseSlab.reserve(shape, n, like.dtype, like.device)
            for name, n in slots.items()
            if n
        }
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

        def target(name: str) -> PackTarget:
            codes, slab = room.dense[name], room.sparse.get(name)
            if slab is None:
                return PackTarget(codes, status)
            return PackTarget(
                codes, status, slab.begin, slab.count, slab.positions, slab.values, slab.cursor
            )

        done = self.quantizer.kernel_pack_into(
            keys, values, target("keys"), target("values"), room.dense["zero"], room.dense["scale"],
            places,
        )  # fmt: skip
        if not done:
            raise RuntimeError("KVQUANT_KERNELS: changed while a cache was in use")

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        dense, sparse = packed.dense, packed.sparse
        keys = PackedKeys(dense["keys"], sparse.get("keys"))
        values = PackedValues(dense["values"], dense["zero"], dense["scale"], sparse.get("values"))
        return (
            self.quantizer.unpack_keys(keys, shape),
            self.quantizer.unpack_values(values, shape),
        )

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        return self.quantizer.fake_keys(keys), self.quantizer.fake_values(values)


def make_codec(spec: NuqScheme, layer: int, tables: LayerQuantizer) -> Codec:
    """Returns the codec of a layer."""
    return NuqCodec(spec, tables)
