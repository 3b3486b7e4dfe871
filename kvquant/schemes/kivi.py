"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750), written from the paper.

Keys (after RoPE) are quantized asymmetrically per channel in groups of `group` tokens, values per
token in groups of `group` channels, with a 16-bit scale and minimum per group. The most recent
`residual` tokens stay in 16 bits. Here a group of keys is packed as soon as all of its tokens are
older than the residual window, which keeps between `residual` and `residual + group - 1` tokens.
The paper flushes keys `residual` tokens at a time. With `sinks` the first tokens of each sequence
stay in 16 bits as well and groups begin behind them. The published method has none (`sinks: 0`).
"""

from __future__ import annotations

import torch

from kvquant.cache.codec import Codec, Packed
from kvquant.errors import UserError
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.packing import pack, unpack
from kvquant.study.schemes import KiviScheme


def encode_groups(
    x: torch.Tensor, axis: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encodes groups along `axis` by rounding to the nearest level.

    Args:
        x: fp16/bf16; the whole of `axis` is one group.
        axis: The dimension of the groups.
        bits: Bits per code.

    Returns:
        uint8 codes of `x.shape`, and 16-bit minimum and scale with `axis` of size 1.
    """
    wide = x.float()
    minimum = wide.amin(axis, keepdim=True)
    scale = ((wide.amax(axis, keepdim=True) - minimum) / (2**bits - 1)).to(x.dtype)
    minimum = minimum.to(x.dtype)
    step = scale.float()
    inverse = torch.where(step == 0, torch.zeros_like(step), 1.0 / step)
    codes = ((wide - minimum.float()) * inverse).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), minimum, scale


def decode_groups(codes: torch.Tensor, minimum: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decodes codes to fp32."""
    return codes.float().mul_(scale.float()).add_(minimum.float())


class KiviCodec(Codec):
    """Packs the blocks of one layer in KIVI's groups, without calibration."""

    rotated_keys = True

    def __init__(self, spec: KiviScheme) -> None:
        self.bits = spec.bits
        self.group = spec.group
        self.sinks, self.block_size, self.residual = spec.sinks, spec.group, spec.residual

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        if head_dim % self.group:
            raise UserError(
                f"group: {self.group} does not divide head_dim {head_dim}; choose a group that does"
            )

    def _split_values(self, values: torch.Tensor) -> torch.Tensor:
        dim = values.shape[-1]
        if dim % self.group:
            raise ValueError(f"group: {self.group} does not divide head_dim {dim}")
        return values.unflatten(-1, (dim // self.group, self.group))

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        blocks, heads = keys.shape[:2]
        codes, key_minimum, key_scale = encode_groups(keys, 2, self.bits)
        key_codes = pack(codes.reshape(blocks, heads, -1), self.bits)
        codes, minimum, scale = encode_groups(self._split_values(values), -1, self.bits)
        return Packed(
            {
                "keys": key_codes,
                "key_minimum": key_minimum,
                "key_scale": key_scale,
                "values": pack(codes.reshape(blocks, heads, -1), self.bits),
                "minimum": minimum,
                "scale": scale,
            }
        )

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        d = packed.dense
        codes = unpack(d["keys"], self.bits).view(shape)
        keys = decode_groups(codes, d["key_minimum"], d["key_scale"])
        codes = self._split_values(unpack(d["values"], self.bits).view(shape))
        return keys, decode_groups(codes, d["minimum"], d["scale"]).view(shape)

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`; the last group of keys may be shorter."""
        parts = [decode_groups(*encode_groups(k, 2, self.bits)) for k in keys.split(self.group, 2)]
        grouped = decode_groups(*encode_groups(self._split_values(values), -1, self.bits))
        return torch.cat(parts, 2), grouped.flatten(-2)


def make_codec(spec: KiviScheme, layer: int, tables: LayerQuantizer | None) -> Codec:
    """Returns the codec of a layer, which is the same for all layers."""
    return KiviCodec(spec)
