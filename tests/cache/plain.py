"""The cache written down plainly: one sequence, no blocks in memory, no packing, no batch.

What the cache must hold of a sequence and what attention over it must give. Codes need the cache's
own fp32 arithmetic to be equal bit for bit; attention is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvquant.formats.layer_quantizer import LayerQuantizer, outliers_per_side
from kvquant.study.schemes import NuqScheme
from tests.support import rope


def codes_of(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the nearest level, the lower one on a tie: how many midpoints lie below."""
    middles = (levels[:-1] + levels[1:]) * 0.5
    return (x.unsqueeze(-1) > middles).sum(-1)


def quantize_keys(
    x: torch.Tensor, tables: LayerQuantizer, outliers: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes back, and which elements are outliers.

    Args:
        x: 16-bit `[tokens, heads, dim]`.
        tables: Calibration.
        outliers: 0: none; 1: all; else those outside the calibrated range.
    """
    zero, scale = tables.key_zero, tables.key_scale
    away = x.float() - zero
    normal = away * torch.where(scale == 0, torch.zeros(()), 1.0 / scale)
    # what differs from a channel that was constant in calibration is outside its range
    normal = torch.where((scale == 0) & (away != 0), away.sign() * torch.inf, normal)
    aside = torch.zeros(x.shape, dtype=torch.bool)
    if outliers >= 1:
        aside |= True
    elif outliers > 0:
        aside = normal.abs() > 1
    back = tables.key_levels[codes_of(normal, tables.key_levels)] * scale + zero
    return torch.where(aside, x.float(), back), aside


def quantize_values(
    x: torch.Tensor, tables: LayerQuantizer, outliers: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for values: per token, the largest and smallest by rank are outliers.

    An element that ties make both is one outlier.
    """
    tokens, heads, dim = x.shape
    rows = x.reshape(tokens, heads * dim)
    side = outliers_per_side(outliers, heads * dim)
    aside = torch.zeros(rows.shape, dtype=torch.bool)
    # stable: of equal elements the first channel counts as the more extreme
    for order in (rows.float().sort(dim=1, stable=True), (-rows.float()).sort(dim=1, stable=True)):
        aside.scatter_(1, order.indices[:, :side], True)
    if outliers >= 1:
        aside |= True
    wide = rows.float()
    top = torch.where(aside, -torch.inf, wide).amax(1, keepdim=True)
    bottom = torch.where(aside, torch.inf, wide).amin(1, keepdim=True)
    every = aside.all(1, keepdim=True)
    top, bottom = (torch.where(every, torch.zeros(()), end) for end in (top, bottom))
    zero, scale = (y.to(x.dtype).float() for y in ((top + bottom) * 0.5, (top - bottom) * 0.5))
    inverse = torch.where(scale == 0, torch.zeros(()), 1.0 / scale)
    back = tables.value_levels[codes_of((wide - zero) * inverse, tables.value_levels)]
    back = torch.where(aside, wide, back * scale + zero)
    return back.view(x.shape), aside.view(x.shape)


def turn(x: torch.Tensor, first: int, base: float = 10000.0) -> torch.Tensor:
    """RoPE of float64 `[tokens, heads, dim]` at positions `first`, `first + 1`, ..."""
    dim = x.shape[-1]
    rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (first + torch.arange(x.shape[0], dtype=torch.float64))[:, None, None] * rates
    left, right = x.double().chunk(2, -1)
    return torch.cat(
        [left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1
    )


@dataclass
class Sequence:
    """One sequence and what the cache makes of it.

    Attributes:
        queries: `[tokens, query heads, dim]`, before RoPE.
        keys: `[tokens, kv heads, dim]`, before RoPE.
        values: The same shape.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return self.keys.shape[0]

    def prepare(self, spec: NuqScheme, tables: LayerQuantizer) -> Sequence:
        """Quantizes every token once; a token's codes depend on nothing but itself."""
        kind = torch.bfloat16 if self.keys.dtype is torch.bfloat16 else torch.float16
        self.spec = spec
        self.given = self.keys  # as the cache gets them to store
        if spec.keys_after_rope:
            cos, sin = rope.rope(torch.arange(self.length), self.keys.shape[2])
            self.given = rope.rotate(self.keys, cos[:, None], sin[:, None])
        self.rounded = (self.given.to(kind), self.values.to(kind))
        keys, self.key_outliers = quantize_keys(self.rounded[0], tables, spec.outliers)
        values, self.value_outliers = quantize_values(self.rounded[1], tables, spec.outliers)
        self.quantized = (keys, values)
        return self

    def packed(self, length: int) -> slice:
        """Tokens that lie in blocks once the sequence has `length` tokens."""
        size = self.spec.block_size
        return slice(
            self.spec.sinks, self.spec.sinks + max(0, length - self.spec.sinks) // size * size
        )

    def stored(self, length: int, *, simulated: bool = False) -> list[torch.Tensor]:
        """fp32 keys and values of the first `length` tokens as the cache returns them.

        Protocol B (`simulated`) reads the tokens of an unfinished block quantized as well.
        """
        part = slice(self.spec.sinks, length) if simulated else self.packed(length)
        out = []
        for exact, coded in zip(self.rounded, self.quantized, strict=True):
            x = exact[:length].float().clone()
            x[part] = coded[:length][part]
            out.append(x)
        return out

    def attention(self, cuts: list[int], protocol: str) -> torch.Tensor:
        """float64 `[tokens, query heads, dim]` of calls that end at the tokens `cuts`."""
        outputs, start = [], 0
        for stop in cuts:
            if stop == start:
                continue
            if protocol == "B":
                keys, values = self.stored(stop, simulated=True)
            else:
                past = self.stored(start)
                keys, values = (
                    torch.cat([p, x[start:stop].float()])
                    for p, x in zip(past, (self.given, self.values), strict=True)
                )
            outputs.append(self._attend(start, stop, keys, values))
            start = stop
        return torch.cat(outputs)

    def _attend(self, start: int, stop: int, keys: Any, values: Any) -> torch.Tensor:
        group = self.queries.shape[1] // keys.shape[1]
        queries = turn(self.queries[start:stop].double(), start).transpose(0, 1)
        turned = keys.double() if self.spec.keys_after_rope else turn(keys.double(), 0)
        turned = turned.transpose(0, 1).repeat_interleave(group, 0)
        wide = values.double().transpose(0, 1).repeat_interleave(group, 0)
        scores = queries @ turned.transpose(1, 2) * queries.shape[-1] ** -0.5
        later = torch.arange(stop)[None] > torch.arange(start, stop)[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return (weights @ wide).transpose(0, 1)
