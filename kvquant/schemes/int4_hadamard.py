"""INT4 after a Hadamard rotation, in the style of SAW-INT4 (arXiv 2604.19157).

Each token's keys (after RoPE) and values are rotated within their head, which spreads outlier
channels over all channels. They are then quantized asymmetrically with a 16-bit minimum and scale
per token and head, which takes 4 + 32 / head_dim bits per element.
"""

from __future__ import annotations

import torch

from kvquant.cache.codec import Codec, Packed, check_packable
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.packing import pack, unpack
from kvquant.quantization.hadamard import factors, rotate
from kvquant.schemes.kivi import decode_groups, encode_groups
from kvquant.study.schemes import Int4HadamardScheme

BITS = 4


def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encodes fp16/bf16 `[..., tokens, head_dim]` as uint8 codes, 16-bit minimums and scales."""
    return encode_groups(rotate(x.float()).to(x.dtype), -1, BITS)


def decode(codes: torch.Tensor, minimum: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decodes codes to fp32."""
    return rotate(decode_groups(codes, minimum, scale), inverse=True)


class Int4HadamardCodec(Codec):
    """Packs the blocks of one layer in rotated INT4, without calibration."""

    rotated_keys = True

    def __init__(self, spec: Int4HadamardScheme) -> None:
        self.sinks, self.block_size, self.residual = spec.sinks, spec.block_size, spec.residual

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        check_packable(head_dim)
        factors(head_dim)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        dense = {}
        for name, x in (("keys", keys), ("values", values)):
            codes, minimum, scale = encode(x)
            dense[name] = pack(codes, BITS)
            dense[f"{name}_minimum"], dense[f"{name}_scale"] = minimum, scale
        return Packed(dense)

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        d = packed.dense
        keys, values = (
            decode(unpack(d[n], BITS).view(shape), d[f"{n}_minimum"], d[f"{n}_scale"])
            for n in ("keys", "values")
        )
        return keys, values

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        return decode(*encode(keys)), decode(*encode(values))


def make_codec(spec: Int4HadamardScheme, layer: int, tables: LayerQuantizer | None) -> Codec:
    """Returns the codec of a layer, which is the same for all layers."""
    return Int4HadamardCodec(spec)
