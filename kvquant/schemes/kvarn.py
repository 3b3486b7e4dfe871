"""KVarN (Muller et al., 2026, arXiv 2606.03458), after its authors' github.com/huawei-csl/KVarN.

The keys (after RoPE) or values of `tile` successive tokens in one head form a tile. Its tokens are
rotated by a Hadamard matrix. Then they are divided by one scale per token and one per channel,
which bring the standard deviations of all tokens and of all channels near 1, and rounded to the
nearest level between minimum and maximum, keys per channel and values per token. The balancing
scale of that axis is multiplied into step and minimum, so a tile stores these two for one axis and
a scale for the other. All are fp16, as in the repository, so an element takes
`bits + 24 / head_dim + 24 / tile` bits. Factors are multiplied here, where the authors add their
logarithms. As theirs, scales are at least exp(-0.3). What lies further below the rest stays out of
balance, and so does a tile whose deviations are all small.

The authors' cache keeps in 16 bits the first 128 tokens (`sinks`) and those of an unfinished tile,
as all schemes of blocks do here. `residual` keeps more of the most recent ones.
"""

from __future__ import annotations

import math

import torch

from kvquant.cache.codec import Codec, Packed
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.formats.packing import pack, unpack
from kvquant.quantization.hadamard import factors, rotate
from kvquant.study.schemes import KvarnScheme

TOKENS, CHANNELS = -2, -1  # dimensions of `[blocks, num_kv_heads, tokens, head_dim]`
# The published limits of a factor of one pass, and of the scales.
FACTORS = (1e-3, 1e3)
SCALES = (math.exp(-0.3), math.exp(10.0))
# Elements that are balanced at a time: what fits a CPU's caches, and 64 MiB elsewhere.
CPU_PIECE, PIECE = 2**19, 2**24


def _sum(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums along a dimension in float64, whose result does not depend on the order of the sum.

    A reduction of torch may take another order for other shapes, but a tile's codes must not depend
    on the tiles beside it. A float64 sum of 128 fp32 numbers is exact as long as they lie within a
    factor of 2^22, and what an order could change of others is far below fp32's rounding.
    """
    return x.sum(axis, keepdim=True, dtype=torch.float64).float()


def deviation(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Returns the sample standard deviation along a dimension, 0 for a single element."""
    size = x.shape[axis]
    centered = x - _sum(x, axis) / size
    return (_sum(centered.square_(), axis) / max(1, size - 1)).sqrt_()


def _ratio(x: torch.Tensor) -> torch.Tensor:
    """Returns the largest over the smallest deviation of each tile, `[..., 1, 1]`."""
    return x.amax((-2, -1), keepdim=True) / x.amin((-2, -1), keepdim=True).clamp(min=1e-8)


def balance(x: torch.Tensor, axis: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds scales of tokens and channels that make their standard deviations alike.

    Each pass normalizes one axis, then the other. An axis is out of balance by its largest over its
    smallest deviation. The scales of the pass with the least sum of both are returned, those from
    before the first pass (1) included.

    Args:
        x: fp32 tiles `[..., tokens, channels]`.
        axis: The dimension along which elements will share levels; it is normalized last.
        iterations: Number of passes.

    Returns:
        The scales of what lies along `axis` (of size 1 there), and of the other dimension.
    """
    other = TOKENS if axis == CHANNELS else CHANNELS
    along, across = deviation(x, axis), deviation(x, other)  # of x over its scales, from here on
    scale, cross = torch.ones_like(along), torch.ones_like(across)
    least, best = _ratio(along) + _ratio(across), (scale, cross)
    for _ in range(iterations):
        cross = (cross * across.clamp(*FACTORS)).clamp(*SCALES)
        plain = deviation(x / cross, axis)
        scale = (scale * (plain / scale).clamp(*FACTORS)).clamp(*SCALES)
        along, across = plain / scale, deviation(x / scale, other) / cross
        found = _ratio(along) + _ratio(across)
        better = found <= least
        least = torch.where(better, found, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, cross, best[1]))
    return best


def _half(x: torch.Tensor) -> torch.Tensor:
    """Rounds to fp16; what is larger than its numbers becomes the largest."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).half()


def _encode(x: torch.Tensor, axis: int, bits: int, iterations: int) -> tuple[torch.Tensor, ...]:
    turned = rotate(x.float())
    scale, cross = balance(turned, axis, iterations)
    even = turned / cross / scale
    low = even.amin(axis, keepdim=True)
    step = ((even.amax(axis, keepdim=True) - low) / (2**bits - 1)).clamp_(min=1e-10)
    codes = ((even - low) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, _half(low * scale), _half(step * scale), _half(cross)


def encode(x: torch.Tensor, axis: int, bits: int, iterations: int) -> tuple[torch.Tensor, ...]:
    """Encodes tiles.

    Args:
        x: fp16/bf16 `[blocks, num_kv_heads, tokens, head_dim]`, one tile per block and head.
        axis: The dimension along which elements share levels.
        bits: Bits per code.
        iterations: Passes of :func:`balance`.

    Returns:
        uint8 codes of `x.shape`, fp16 minimum and step, of size 1 along `axis`, and fp16 scales of
        the other dimension.
    """
    room = CPU_PIECE if x.device.type == "cpu" else PIECE
    pieces = x.split(max(1, room // x[0].numel()))
    parts = zip(*(_encode(piece, axis, bits, iterations) for piece in pieces), strict=True)
    return tuple(torch.cat(part) for part in parts)


def decode(
    codes: torch.Tensor, minimum: torch.Tensor, step: torch.Tensor, cross: torch.Tensor
) -> torch.Tensor:
    """Decodes codes to fp32."""
    turned = codes.float().mul_(step.float()).add_(minimum.float()).mul_(cross.float())
    return rotate(turned, inverse=True)


class KvarnCodec(Codec):
    """Packs the blocks of one layer with KVarN, a tile per block and head, without calibration."""

    rotated_keys = True

    def __init__(self, spec: KvarnScheme) -> None:
        self.sinks, self.block_size, self.residual = spec.sinks, spec.tile, spec.residual
        self._iterations = spec.iterations
        # axis that shares levels, and bits
        self._plans = {
            "keys": (TOKENS, spec.bits),
            "values": (CHANNELS, spec.value_bits or spec.bits),
        }

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        factors(head_dim)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        dense = {}
        for (name, (axis, bits)), x in zip(self._plans.items(), (keys, values), strict=True):
            codes, minimum, step, cross = encode(x, axis, bits, self._iterations)
            dense[name] = pack(codes.flatten(2), bits)
            dense[f"{name}_minimum"], dense[f"{name}_step"] = minimum, step
            dense[f"{name}_cross"] = cross
        return Packed(dense)

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        d = packed.dense
        keys, values = (
            decode(
                unpack(d[name], bits).view(shape),
                *(d[f"{name}_{part}"] for part in ("minimum", "step", "cross")),
            )
            for name, (_, bits) in self._plans.items()
        )
        return keys, values

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`; the last tile may have fewer tokens."""
        both = [
            torch.cat(
                [
                    decode(*encode(tile, axis, bits, self._iterations))
                    for tile in x.split(self.block_size, TOKENS)
                ],
                TOKENS,
            )
            for (axis, bits), x in zip(self._plans.values(), (keys, values), strict=True)
        ]
        return both[0], both[1]


def make_codec(spec: KvarnScheme, layer: int, tables: LayerQuantizer | None) -> Codec:
    """Returns the codec of a layer, which is the same for all layers."""
    return KvarnCodec(spec)
