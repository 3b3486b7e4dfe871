"""Our scheme: non-uniform codes with exact outliers, keys before RoPE."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.batched_quant import (
    BatchedKVQuantizer,
    LayerQuantizer,
    PackedKeys,
    PackedValues,
)
from kvquant.config import NuqScheme
from kvquant.schemes.base import Codec


@dataclass(frozen=True)
class NuqBlocks:
    """Packed keys and values of some blocks."""

    keys: PackedKeys
    values: PackedValues

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self.keys.nbytes + self.values.nbytes

    def select(self, blocks: torch.Tensor) -> NuqBlocks:
        """The given blocks as a new object."""
        return NuqBlocks(self.keys.select(blocks), self.values.select(blocks))


class NuqCodec(Codec):
    """Packs one layer with the tables of its quantizer file."""

    def __init__(self, spec: NuqScheme, tables: LayerQuantizer) -> None:
        self.quantizer = BatchedKVQuantizer(tables, spec.bits, spec.outliers)
        self.sinks = spec.sinks
        self.block_size = spec.block_size
        self.shared_bytes = tables.nbytes

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> NuqBlocks:
        """See :meth:`Codec.pack`."""
        return NuqBlocks(self.quantizer.pack_keys(keys), self.quantizer.pack_values(values))

    def unpack(
        self, packed: NuqBlocks, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        keys = self.quantizer.unpack_keys(packed.keys, shape)
        return keys, self.quantizer.unpack_values(packed.values, shape)

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        return self.quantizer.fake_keys(keys), self.quantizer.fake_values(values)
