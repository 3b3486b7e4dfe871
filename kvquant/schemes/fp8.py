"""8-bit floating point (E4M3), the low-precision cache that serving engines offer.

Keys are stored after RoPE. `scale: token-head` stores one 16-bit scale per token and head, which
maps the largest magnitude to 448, the largest number of E4M3 (Micikevicius et al., arXiv
2209.05433). `scale: none` casts without a scale and saturates at 448, as engines do without
calibrated scales. Transformers' own FP8 cache, with one scale per tensor, is `kind: hf-fp8`.
"""

from __future__ import annotations

import torch

from kvquant.cache.codec import Codec, Packed
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.study.schemes import Fp8Scheme

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def encode(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Encodes data as E4M3, one byte per element, saturated at the largest number.

    The data is clamped first, because only some releases of torch saturate in the cast itself.

    Args:
        x: fp16/bf16, of any shape.
        scale: 16-bit scales, broadcast against `x`; None stands for 1.
    """
    wide = x.float()
    if scale is not None:
        step = scale.float()
        wide = wide * torch.where(step == 0, torch.zeros_like(step), 1.0 / step)
    return wide.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def decode(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Decodes E4M3 bytes to fp32."""
    wide = codes.view(torch.float8_e4m3fn).float()
    return wide if scale is None else wide * scale.float()


def token_scale(x: torch.Tensor) -> torch.Tensor:
    """Returns one 16-bit scale per token and head, `[..., tokens, 1]`."""
    return (x.float().abs().amax(-1, keepdim=True) / LARGEST).to(x.dtype)


class Fp8Codec(Codec):
    """Packs the blocks of one layer in E4M3, without calibration."""

    rotated_keys = True

    def __init__(self, spec: Fp8Scheme) -> None:
        self.scaled = spec.scale == "token-head"
        self.sinks, self.block_size, self.residual = spec.sinks, spec.block_size, spec.residual

    def _scale(self, x: torch.Tensor) -> torch.Tensor | None:
        return token_scale(x) if self.scaled else None

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        dense = {}
        for name, x in (("keys", keys), ("values", values)):
            scale = self._scale(x)
            dense[name] = encode(x, scale)
            if scale is not None:
                dense[f"{name}_scale"] = scale
        return Packed(dense)

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        d = packed.dense
        return (
            decode(d["keys"], d.get("keys_scale")).view(shape),
            decode(d["values"], d.get("values_scale")).view(shape),
        )

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        keys_scale, values_scale = self._scale(keys), self._scale(values)
        return (
            decode(encode(keys, keys_scale), keys_scale),
            decode(encode(values, values_scale), values_scale),
        )


def make_codec(spec: Fp8Scheme, layer: int, tables: LayerQuantizer | None) -> Codec:
    """Returns the codec of a layer, which is the same for all layers."""
    return Fp8Codec(spec)
