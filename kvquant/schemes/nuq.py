"""Our scheme: non-uniform codes with exact outliers, keys before RoPE."""

from __future__ import annotations

import torch

from kvquant.batched_quant import BatchedKVQuantizer, LayerQuantizer, PackedKeys, PackedValues
from kvquant.config import NuqScheme
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.schemes.base import Codec, Packed


class NuqCodec(Codec):
    """Packs one layer with the tables of its quantizer file."""

    def __init__(self, spec: NuqScheme, tables: LayerQuantizer) -> None:
        self.quantizer = BatchedKVQuantizer(tables, spec.bits, spec.outliers)
        self.sinks = spec.sinks
        self.block_size = spec.block_size
        self.shared_bytes = tables.nbytes
        self.tables = tables

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        bad = None
        packed = self.quantizer.triton_pack(keys, values)
        if packed is None:
            k, v = self.quantizer.pack_keys(keys), self.quantizer.pack_values(values)
        else:
            k, v, bad = packed
        dense = {"keys": k.codes, "values": v.codes, "zero": v.zero, "scale": v.scale}
        sparse = {
            name: slab
            for name, slab in (("keys", k.outliers), ("values", v.outliers))
            if slab is not None
        }
        return Packed(dense, sparse, bad)

    def decode_shape(self, head_dim: int, group: int, dtype: torch.dtype) -> DecodeShape | None:
        """See :meth:`Codec.decode_shape`."""
        if self.quantizer.outliers >= 1:  # a passthrough, for tests
            return None
        return DecodeShape(
            self.quantizer.bits,
            head_dim,
            group,
            self.block_size,
            dtype,
            self.quantizer.outliers > 0,
        )

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
