"""CQ, Coupled Quantization (Zhang et al., NeurIPS 2024, arXiv 2405.03917), a calibrated peer.

The channels of a head are cut into groups of `channels` neighbours. A group of a token has one
code, the index of its nearest centroid by Euclidean distance. Each group of each head has a
codebook of its own for keys and one for values, which calibration fits
(:mod:`kvquant.calibration.cq_build`). Keys are coded before RoPE. `CQ-<c>c<b>b` of the paper is
`channels: c` and `bits: b / c`: 4c8b is 2 bits per channel, 2c8b is 4, 8c8b is 1. Codes have up to
8 bits, so that the paper's 8c10b is not offered. No element is kept exactly; the windows of recent
16-bit tokens of some of its experiments are `residual`.

The authors published no code; this is written from descriptions of the method. They fit centroids
to all of 16 sequences of 2048 tokens, here to at most `samples` tokens of this study's calibration
text.

An element takes `bits` bits and its share of the codebooks, which are held in fp16 and count among
the cache's bytes: 16 bits times `2**(channels * bits)` per channel, of keys and of values each.
With codes of 8 bits that is as much as 256 unquantized tokens, whatever the model: 2 bits per
element for one sequence of 2048 tokens, 0.25 for 16384, less where a batch shares them.
"""

from __future__ import annotations

import torch

from kvquant.cache.codec import Codec, Packed, check_made_for
from kvquant.errors import UserError
from kvquant.formats.cq_layer import CqLayer
from kvquant.formats.packing import pack, unpack
from kvquant.quantization.block_input import check_block, not_finite
from kvquant.study.schemes import CqScheme

LARGEST = torch.finfo(torch.float16).max
# Distances that are computed at a time: what fits a CPU's caches, and 64 MiB elsewhere.
CPU_PIECE, PIECE = 2**18, 2**24


class _Coder:
    """Encodes and decodes one layer's keys or values.

    Args:
        centroids: fp32 `[num_heads, 2**width, head_dim]`, see :class:`CqLayer`.
        channels: Channels per code.
    """

    def __init__(self, centroids: torch.Tensor, channels: int) -> None:
        self.count = centroids.shape[1]
        parts = centroids.unflatten(2, (-1, channels)).transpose(1, 2)
        self.table = parts.half().contiguous()  # [heads, groups, count, channels]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the uint8 codes of 16-bit `[blocks, num_heads, size, head_dim]`.

        Their shape is `[blocks, num_heads, size, groups]`.
        """
        heads, groups, count, channels = self.table.shape
        flat = x.transpose(1, 2).flatten(0, 1).unflatten(2, (groups, channels))
        room = CPU_PIECE if x.device.type == "cpu" else PIECE
        columns = self.table.float().unbind(3)
        pieces = flat.split(max(1, room // (heads * groups * count)))
        codes = torch.cat([self._nearest(piece, columns) for piece in pieces])
        return codes.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2).contiguous()

    def _nearest(self, rows: torch.Tensor, columns: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Returns the codes of `[tokens, heads, groups, channels]`.

        Squares are added one channel after the other, so that a token's code does not depend on the
        tokens beside it, as it may where a product of matrices sums up.
        """
        wide = rows.float().clamp(-LARGEST, LARGEST).unsqueeze(4)
        distance = (wide[:, :, :, 0] - columns[0]).square_()
        for channel in range(1, len(columns)):
            distance += (wide[:, :, :, channel] - columns[channel]).square_()
        return distance.argmin(-1).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Decodes codes to fp32 `[blocks, num_heads, size, head_dim]`."""
        heads, groups, count, _ = self.table.shape
        first = torch.arange(heads * groups, device=codes.device).view(heads, 1, groups) * count
        vectors = self.table.flatten(0, 2)
        return vectors[(codes.long() + first)].float().flatten(3)


class CqCodec(Codec):
    """Packs the blocks of one layer with the centroids of its quantizer file."""

    def __init__(self, spec: CqScheme, layer: CqLayer) -> None:
        self.sinks, self.block_size, self.residual = spec.sinks, spec.block_size, spec.residual
        heads, _, dim = layer.key_centroids.shape
        if dim % spec.channels:
            raise UserError(f"channels: {spec.channels} does not divide the head_dim {dim}")
        self._width = int(spec.table_bits)
        self._coders = {
            "keys": _Coder(layer.key_centroids, spec.channels),
            "values": _Coder(layer.value_centroids, spec.channels),
        }
        self.shape = (heads, dim)
        self.shared_bytes = sum(coder.table.nbytes for coder in self._coders.values())

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        check_made_for(self.shape, num_kv_heads, head_dim)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        dense = {}
        for (name, coder), x in zip(self._coders.items(), (keys, values), strict=True):
            check_block(x, name)  # every vector has a nearest centroid, even one of NaN
            dense[name] = pack(coder.encode(x).flatten(2), self._width)
        return Packed(dense, bad=not_finite(keys, values) if keys.is_cuda else None)

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        keys, values = (
            coder.decode(unpack(packed.dense[name], self._width).view(*shape[:3], -1))
            for name, coder in self._coders.items()
        )
        return keys, values

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        found = []
        for (name, coder), x in zip(self._coders.items(), (keys, values), strict=True):
            check_block(x, name)
            found.append(coder.decode(coder.encode(x)))
        return found[0], found[1]


def make_codec(spec: CqScheme, layer: int, tables: CqLayer) -> Codec:
    """Returns the codec of a layer."""
    return CqCodec(spec, tables)
