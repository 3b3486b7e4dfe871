"""WUSH-KV (Chen et al., 2026, arXiv 2609.38121), a calibrated peer, written from the paper.

A head's keys (after RoPE) and values are multiplied by a matrix of their own, which calibration
finds in closed form (:mod:`kvquant.quantization.wush_transform`): that of keys from the second
moments of keys and of the queries that read them, that of values from the second moments of values
and of the rows of W_O that they are multiplied by. Each token is then coded per head by QuEST's
clipped uniform quantizer, which the paper measures perplexity with: `2**bits` levels evenly spaced
between plus and minus a constant times the root mean square, the constant being best for a normal
variable. The step is stored in fp16, so that an element takes `bits + 16 / head_dim` bits. The
OSCAR-style quantizer of the paper's downstream tasks is not implemented.

The paper folds the transform of values into the model's weights and applies that of keys to queries
as well. Here keys and values are transformed as they are packed and back as they are read, which
gives attention the same numbers but for rounding. The transforms and their inverses, 16 bits per
element of `4 * head_dim**2` per head, count among the cache's bytes; with the values' folded, half
of them would. The published windows of 16-bit tokens are the defaults: 16 first tokens (`sinks`),
128 most recent ones (`residual`), and blocks of 16.
"""

from __future__ import annotations

import functools
import math

import torch
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

from kvquant.cache.codec import Codec, Packed, check_made_for
from kvquant.errors import UserError
from kvquant.formats.packing import pack, unpack
from kvquant.formats.wush_layer import WushLayer
from kvquant.kernels.pytorch_fused import inverse_range
from kvquant.quantization.exact_product import MATRIX, MAX_SIZE, VECTOR, product, to_grid
from kvquant.quantization.hadamard import factors
from kvquant.study.schemes import WushKvScheme

PIECE = 2**24  # elements that are coded at a time


@functools.cache
def best_range(bits: int) -> float:
    """Returns where to clip a standard normal variable that gets evenly spaced levels.

    The levels lie in the middle of `2**bits` equal bins, and the mean squared error is smallest.
    """

    def error(end: float) -> float:
        step = 2 * end / (2**bits - 1)
        total = 1.0  # of the variable itself
        for k in range(2 ** (bits - 1)):
            low, level = k * step, (k + 0.5) * step
            high = math.inf if k == 2 ** (bits - 1) - 1 else low + step
            mass = ndtr(high) - ndtr(low)
            mean = (math.exp(-(low**2) / 2) - math.exp(-(high**2) / 2)) / math.sqrt(2 * math.pi)
            total += 2 * (level**2 * mass - 2 * level * mean)
        return float(total)

    found = minimize_scalar(error, bounds=(0.5, 6.0), method="bounded", options={"xatol": 1e-9})
    return float(found.x)


class _Matrices:
    """One matrix per head as fp16 of its largest element, so that exact products take them."""

    def __init__(self, matrices: torch.Tensor) -> None:
        self.largest = matrices.abs().amax((1, 2), keepdim=True).double()
        self.parts = (matrices.double() / self.largest).half()

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.largest.nbytes + self.parts.nbytes

    def whole(self) -> torch.Tensor:
        """Returns the matrices, float64 `[heads, dim, dim]`."""
        return self.parts.double() * self.largest

    def times(self, grid: torch.Tensor) -> torch.Tensor:
        """Returns the products with whole numbers `[heads, tokens, dim]`, in float64."""
        # An fp16 number of at most 1 is a multiple of 2**-24.
        return product(grid, self.parts.double().mT * MATRIX) * (self.largest / MATRIX)


class _Coder:
    """Encodes and decodes one layer's keys or values."""

    def __init__(self, transform: torch.Tensor, bits: int) -> None:
        self.bits = bits
        self._forth = _Matrices(transform)
        self._back = _Matrices(torch.linalg.inv(self._forth.whole()))
        self._step = 2 * best_range(bits) / (2**bits - 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self._forth.nbytes + self._back.nbytes

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes 16-bit `[blocks, num_heads, size, head_dim]` as codes and fp16 steps."""
        found = [self._encode(piece) for piece in x.split(max(1, PIECE // x[0].numel()))]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.float().transpose(0, 1).flatten(1, 2)
        peak = rows.abs().amax(-1, keepdim=True)
        even = (self._forth.times(to_grid(rows, peak)) * (peak.double() / VECTOR)).float()
        top = even.abs().amax(-1, keepdim=True)
        # A sum of squares of whole numbers, which no order changes.
        squares = to_grid(even, top).double().square().sum(-1, keepdim=True)
        root = (squares / x.shape[3]).sqrt() * top / VECTOR
        step = (root * self._step).clamp(max=torch.finfo(torch.float16).max).half()
        half = 2 ** (self.bits - 1)
        codes = (even * inverse_range(step.float())).floor_().clamp_(-half, half - 1) + half
        both = (t.unflatten(1, (len(x), -1)).transpose(0, 1) for t in (codes, step))
        return next(both).to(torch.uint8).contiguous(), next(both).contiguous()

    def decode(self, codes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Decodes codes to fp32 `[blocks, num_heads, size, head_dim]`."""
        count = max(1, PIECE // codes[0].numel()) if len(codes) else 1
        pieces = zip(codes.split(count), step.split(count), strict=True)
        return torch.cat([self._decode(*piece) for piece in pieces])

    def _decode(self, codes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        rows, steps = (t.transpose(0, 1).flatten(1, 2) for t in (codes, step))
        twice = rows.float() * 2 - (2**self.bits - 1)  # twice the levels over the step
        out = (self._back.times(twice) * (steps.double() / 2)).float()
        return out.unflatten(1, (len(codes), -1)).transpose(0, 1)


class WushKvCodec(Codec):
    """Packs the blocks of one layer with the transforms of its quantizer file."""

    rotated_keys = True

    def __init__(self, spec: WushKvScheme, layer: WushLayer) -> None:
        self.sinks, self.block_size, self.residual = spec.sinks, spec.block_size, spec.residual
        self._coders = {
            "keys": _Coder(layer.key_transform, spec.bits),
            "values": _Coder(layer.value_transform, spec.value_bits or spec.bits),
        }
        self.shape = tuple(layer.key_transform.shape[:2])
        self.shared_bytes = sum(coder.nbytes for coder in self._coders.values())

    def check_model(self, num_kv_heads: int, head_dim: int) -> None:
        """See :meth:`Codec.check_model`."""
        factors(head_dim)
        if head_dim > MAX_SIZE:
            raise UserError(f"head_dim: {head_dim} is more than {MAX_SIZE}, the most for wush-kv")
        check_made_for(self.shape, num_kv_heads, head_dim)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
        """See :meth:`Codec.pack`."""
        dense = {}
        for (name, coder), x in zip(self._coders.items(), (keys, values), strict=True):
            codes, step = coder.encode(x)
            dense[name], dense[f"{name}_step"] = pack(codes.flatten(2), coder.bits), step
        return Packed(dense)

    def unpack(
        self, packed: Packed, shape: tuple[int, int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.unpack`."""
        d = packed.dense
        keys, values = (
            coder.decode(unpack(d[name], coder.bits).view(shape), d[f"{name}_step"])
            for name, coder in self._coders.items()
        )
        return keys, values

    def fake(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Codec.fake`."""
        both = zip(self._coders.values(), (keys, values), strict=True)
        found = [coder.decode(*coder.encode(x)) for coder, x in both]
        return found[0], found[1]


def make_codec(spec: WushKvScheme, layer: int, tables: WushLayer) -> Codec:
    """Returns the codec of a layer."""
    return WushKvCodec(spec, tables)
