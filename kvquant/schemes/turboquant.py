"""TurboQuant for mean squared error (Zandieh et al., arXiv 2504.19874), written from the paper.

A token's key (after RoPE) or value in one head is split into its norm, stored in 16 bits, and its
direction, which a random rotation makes nearly isotropic. Times sqrt(head_dim), each coordinate is
then nearly a standard normal variable. It is encoded by the Lloyd-Max quantizer of that variable,
the same for all models, layers and heads. The rotation is a Hadamard matrix after random signs of a
fixed seed, in place of the paper's dense random matrix. The inner-product variant (one bit of
residual signs) is not implemented. An element takes bits + 16 / head_dim bits.
"""

from __future__ import annotations

import torch

from kvquant.cache.codec import Codec, Packed, check_packable
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.packing import pack, unpack
from kvquant.kernels import pytorch_fused as fused
from kvquant.quantization.hadamard import factors, rotate
from kvquant.quantization.lloyd_max import lloyd_max
from kvquant.study.schemes import TurboQuantScheme


class TurboQuantCodec(Codec):
    """Packs the blocks of one layer with TurboQuant, without calibration.

    Args:
        spec: The scheme.
        layer: Index of the layer; each layer has its own signs.
    """

    rotated_keys = True

    def __init__(self, spec: TurboQuantScheme, layer: int) -> None:
        self.bits = spec.bits
        self.sinks, self.block_size, self.residual = spec.sinks, spec.block_size, spec.residual
        self._seed = spec.seed * 1_000_003 + layer
        self._levels = torch.tensor(lloyd_max(spec.bits), dtype=torch.float32)
        self._signs: torch.Tensor | None = None

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        check_packable(head_dim)
        factors(head_dim)

    def _tables(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns signs `[num_kv_heads, 1, head_dim]` and levels, on the device of `x`."""
        dim = x.shape[3]
        if self._signs is None or self._signs.device != x.device:
            generator = torch.Generator().manual_seed(self._seed)  # the same on every device
            heads = x.shape[1] if self.share is None else self.share.heads
            bits = torch.randint(0, 2, (heads, 1, dim), generator=generator)
            bits = bits if self.share is None else bits[self.share.own].clone()
            self._signs = (bits * 2 - 1).float().to(x.device)
            self._levels = self._levels.to(x.device)
            self.shared_bytes = self._signs.nbytes + self._levels.nbytes
        return self._signs, self._levels

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes `x` as uint8 codes of the same shape and 16-bit norms `[..., 1]`."""
        signs, levels = self._tables(x)
        wide = x.float().contiguous()  # the rounding of a sum may depend on the strides
        length = wide.square().sum(-1, keepdim=True).sqrt()
        stored = length.clamp(max=torch.finfo(x.dtype).max).to(x.dtype)
        unit = wide * fused.inverse_range(length) * (x.shape[-1] ** 0.5)
        return fused.encode(rotate(unit * signs), levels), stored

    def _decode(self, codes: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        signs, levels = self._tables(codes)
        unit = rotate(fused.decode(codes, levels), inverse=True) * signs
        return unit * (length.float() * codes.shape[-1] ** -0.5)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        dense = {}
        for name, x in (("keys", keys), ("values", values)):
            codes, length = self._encode(x)
            dense[name], dense[f"{name}_norm"] = pack(codes, self.bits), length
        return Packed(dense)

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        d = packed.dense
        keys, values = (
            self._decode(unpack(d[n], self.bits).view(shape), d[f"{n}_norm"])
            for n in ("keys", "values")
        )
        return keys, values

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        return self._decode(*self._encode(keys)), self._decode(*self._encode(values))


def make_codec(spec: TurboQuantScheme, layer: int, tables: LayerQuantizer | None) -> Codec:
    """Returns the codec of a layer."""
    return TurboQuantCodec(spec, layer)
