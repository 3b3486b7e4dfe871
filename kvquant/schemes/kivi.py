"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750), written from the paper.

Keys (after RoPE) are quantized asymmetrically per channel in groups of `group` tokens, values per
token in groups of `group` channels, with a 16-bit scale and minimum a group; the most recent
`residual` tokens stay 16-bit. Here a group of keys is packed as soon as all of its tokens are older
than the residual window, which keeps between `residual` and `residual + group - 1` tokens; the
paper flushes keys `residual` tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.config import KiviScheme
from kvquant.packing import pack, unpack
from kvquant.schemes.base import Codec


@dataclass(frozen=True)
class _Groups:
    """Codes `[blocks, heads, bytes]`; minimum and scale, 16-bit, one a group."""

    codes: torch.Tensor
    minimum: torch.Tensor
    scale: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.minimum.nbytes + self.scale.nbytes

    def select(self, blocks: torch.Tensor) -> _Groups:
        return _Groups(*(t.index_select(0, blocks) for t in (self.codes, self.minimum, self.scale)))


@dataclass(frozen=True)
class KiviBlocks:
    """Packed keys and values of some blocks."""

    keys: _Groups
    values: _Groups

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self.keys.nbytes + self.values.nbytes

    def select(self, blocks: torch.Tensor) -> KiviBlocks:
        """The given blocks as a new object."""
        return KiviBlocks(self.keys.select(blocks), self.values.select(blocks))


def encode_groups(
    x: torch.Tensor, axis: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round-to-nearest codes of groups along `axis`.

    Args:
        x: fp16/bf16; the whole of `axis` is one group.
        axis: The group's dimension.
        bits: Bits a code.

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
    """fp32 data of codes."""
    return codes.float().mul_(scale.float()).add_(minimum.float())


class KiviCodec(Codec):
    """Packs one layer; needs no calibration."""

    rotated_keys = True

    def __init__(self, spec: KiviScheme) -> None:
        self.bits = spec.bits
        self.group = spec.group
        self.block_size = spec.group
        self.residual = spec.residual

    def _split_values(self, values: torch.Tensor) -> torch.Tensor:
        dim = values.shape[-1]
        if dim % self.group:
            raise ValueError(f"group: {self.group} does not divide head_dim {dim}")
        return values.unflatten(-1, (dim // self.group, self.group))

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> KiviBlocks:
        """See :meth:`Codec.pack`."""
        blocks, heads = keys.shape[:2]
        codes, minimum, scale = encode_groups(keys, 2, self.bits)
        packed_keys = _Groups(pack(codes.view(blocks, heads, -1), self.bits), minimum, scale)
        codes, minimum, scale = encode_groups(self._split_values(values), -1, self.bits)
        flat = codes.reshape(blocks, heads, -1)
        return KiviBlocks(packed_keys, _Groups(pack(flat, self.bits), minimum, scale))

    def unpack(
        self, packed: KiviBlocks, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        kg, vg = packed.keys, packed.values
        keys = decode_groups(unpack(kg.codes, self.bits).view(shape), kg.minimum, kg.scale)
        codes = self._split_values(unpack(vg.codes, self.bits).view(shape))
        return keys, decode_groups(codes, vg.minimum, vg.scale).view(shape)

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`; the last group of keys may be shorter."""
        parts = [decode_groups(*encode_groups(k, 2, self.bits)) for k in keys.split(self.group, 2)]
        grouped = decode_groups(*encode_groups(self._split_values(values), -1, self.bits))
        return torch.cat(parts, 2), grouped.flatten(-2)
