"""Block-GTQ (Liang, Zhang and Jia, 2026, arXiv 2606.24033), a calibrated peer.

Both channels of a RoPE pair have codes of one width. Widths are allocated within each kv head by
the energies of queries and keys (:mod:`kvquant.quantization.pair_widths`), so that keys take `bits`
per code in the mean. The pairs of one width form a group, which is coded by a dense random
rotation, a 16-bit norm and Lloyd-Max levels (:mod:`kvquant.quantization.grouped_codes`). Values are
coded in the same way, with one width and one group per head.

This follows the runs of the authors' github.com/JIA-Lab-research/blockgtq that measure quality:
keys are coded before RoPE, every group is rotated, and no token stays in 16 bits unless `sinks` or
`residual` say so. Their packed decode path, which codes keys after RoPE and pads its layouts, is
not followed. Energies are those of this study's calibration text.

An element of keys takes `bits + 16 * groups / head_dim` bits, `groups` of its head, and one of
values `value_bits + 16 / head_dim`.
"""

from __future__ import annotations

import torch

from kvquant.cache.codec import Codec, Packed, check_made_for
from kvquant.errors import UserError
from kvquant.formats.block_gtq_layer import BlockGtqLayer
from kvquant.formats.head_share import HeadShare
from kvquant.quantization.exact_product import MAX_SIZE
from kvquant.quantization.grouped_codes import GroupedCodes
from kvquant.study.schemes import BlockGtqScheme

# Seeds of the rotations of a width's keys and of a head's values, as in the repository.
KEY_SEED, VALUE_SEED = 42, 1000


class BlockGtqCodec(Codec):
    """Packs the blocks of one layer with the widths of its quantizer file."""

    def __init__(self, spec: BlockGtqScheme, layer: BlockGtqLayer) -> None:
        self.sinks, self.block_size, self.residual = spec.sinks, spec.block_size, spec.residual
        widths = layer.key_widths
        self._first = spec.seed * 1_000_003
        self._value_widths = torch.full_like(widths, spec.width_of_values)
        self._keys = GroupedCodes(widths, lambda head, width: self._first + KEY_SEED + width)
        self._values = self._coder_of_values(0)
        self.shape = widths.shape[0], 2 * widths.shape[1]
        self.shared_bytes = self._keys.nbytes + self._values.nbytes

    def _coder_of_values(self, head: int) -> GroupedCodes:
        """Returns the coder of values, the first of whose heads has this number in the model."""
        first = self._first + VALUE_SEED + head
        return GroupedCodes(self._value_widths, lambda head, width: first + head)

    def keep_share(self, share: HeadShare) -> None:
        """See :meth:`Codec.keep_share`."""
        self.share, self._values = share, self._coder_of_values(share.own.start)

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        if head_dim > MAX_SIZE:
            raise UserError(f"head_dim: {head_dim} is more than {MAX_SIZE}, the most for block-gtq")
        check_made_for(self.shape, num_kv_heads, head_dim)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        dense = {}
        for name, coder, x in (("keys", self._keys, keys), ("values", self._values, values)):
            codes, norms = coder.encode(x)
            dense[name], dense[f"{name}_norm"] = coder.rows.pack(codes), norms
        return Packed(dense)

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        d = packed.dense
        keys, values = (
            coder.decode(coder.rows.unpack(d[name], shape[2]), d[f"{name}_norm"])
            for name, coder in (("keys", self._keys), ("values", self._values))
        )
        return keys, values

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        return (
            self._keys.decode(*self._keys.encode(keys)),
            self._values.decode(*self._values.encode(values)),
        )


def make_codec(spec: BlockGtqScheme, layer: int, tables: BlockGtqLayer) -> Codec:
    """Returns the codec of a layer."""
    return BlockGtqCodec(spec, tables)
