"""The CUDA decode kernel on random sequences, compared with attention in float64."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Literal

import torch

from kvquant.cache.arena import Arena
from kvquant.cache.codec import Codec
from kvquant.kernels.arena_table import block_number
from kvquant.kernels.cuda_decode import DecodeShape, DecodeStep, decode_attention
from kvquant.kernels.decode_tables import RopeTables
from kvquant.schemes.allocated import AllocatedCodec
from kvquant.schemes.nuq import NuqCodec
from kvquant.study.schemes import AllocatedScheme, NuqScheme
from tests.support.quantizers import random_allocated, random_quantizer
from tests.support.rope import rope, rotate

# fp16 operands: errors of 2^-11 in keys and queries make about that in the scores.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 1.2e-2}


Made = tuple[Codec, DecodeShape, torch.Tensor]


def allocated_case(
    dim: int,
    group: int,
    size: int,
    outliers: float,
    dtype: torch.dtype,
    heads: int = 2,
    *,
    value_range: Literal["token", "token-head"] = "token",
    seed: int = 0,
    device: str = "cuda",
    width: int | None = None,
    even: bool = False,
    scales: tuple[float, ...] = (),
) -> Made:
    """A codec of allocated codes for :func:`decode_error`, with random widths or one width.

    With `even` the levels of values of 4 bits are evenly spaced; `scales` are those of the heads.
    """
    scale = (2.2, 3.2) if outliers else (5.0, 5.0)
    layer = random_allocated(heads, dim, scale=scale, seed=seed)
    if width is not None:
        layer.key_widths.fill_(width)
        layer.value_widths.fill_(width)
    if even:
        layer.value_levels[3, :16] = torch.linspace(-0.8, 0.9, 16)
    if scales:
        layer.value_scale[:] = torch.tensor(scales)
        layer.value_levels[5] = torch.linspace(-1, 1, 64)  # which reach the ends of every range
    layer = layer.to(device)
    spec = AllocatedScheme(
        kind="allocated", outliers=outliers, block_size=size, rotation=False,
        value_range=value_range,
    )  # fmt: skip
    shape = DecodeShape(
        3, dim, group, size, dtype, outliers > 0, outliers or 0.01, allocated=True,
        range_per_head=value_range == "token-head",
    )  # fmt: skip
    return AllocatedCodec(spec, layer), shape, layer.key_zero


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    soft_cap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[heads, dim]` of queries `[heads, dim]` and rotated keys `[kv_heads, n, dim]`, float64."""
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = (keys @ query[..., None])[..., 0] * scaling
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    if sink_logits is not None:
        scores = torch.cat((scores, sink_logits.double()[:, None]), 1)
    weights = torch.softmax(scores, -1)[:, : keys.shape[1]]
    return (weights[:, None] @ values)[:, 0]


def decode_error(
    bits: int,
    dim: int,
    group: int,
    size: int,
    outliers: float,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    heads: int = 2,
    sinks: int = 1,
    factor: float = 1.0,
    spread: float = 1.0,
    seed: int = 0,
    device: str = "cuda",
    column: float = 0.0,
    made: Made | None = None,
    soft_cap: float | None = None,
    learned: bool = False,
) -> float:
    """Largest relative error, by sequence and head, of sequences of (blocks, tail) tokens.

    With a `column` a channel of all values has that number, and all tokens weigh the same. `made`
    is a codec of other codes than `nuq`, the shape of its kernel and the middles of its keys.
    `learned` are the logits of attention sinks.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    scale = (2.2, 3.2) if outliers else (5.0, 5.0)
    codec: Codec
    if made is None:
        tables = random_quantizer(heads, dim, bits, zero=0.3, scale=scale, seed=seed).to(device)
        spec = NuqScheme(kind="nuq", bits=bits, outliers=outliers, block_size=size)
        codec, key_zero = NuqCodec(spec, tables), tables.key_zero
        shape = DecodeShape(bits, dim, group, size, dtype, outliers > 0)
    else:
        codec, shape, key_zero = made
    total = sum(n for n, _ in lengths)
    batch = len(lengths)
    x = torch.randn(2, max(total, 1), heads, size, dim, device=device)
    x[0] += key_zero[:, None]
    x[1, :, :, 3] += 7.0  # a token far from zero
    x[:, :, :, 5] = 0.25  # a constant one
    x[1] *= spread
    if column:
        x[1, ..., 7] = column
    x = x.to(dtype)
    # Two arenas, filled in disorder.
    order = random.sample(range(max(total, 1)), max(total, 1))
    cut = max(1, len(order) // 3)
    arenas = []
    for part in (order[:cut], order[cut:] or order[:1]):
        packed = codec.pack(x[0, part], x[1, part])
        arenas.append(Arena(len(part), packed))
    where = {b: (0, i) for i, b in enumerate(order[:cut])}
    where |= {b: (1, i) for i, b in enumerate(order[cut:])}
    rows = torch.tensor([a.addresses for a in arenas], device=device)
    most = max(n for n, _ in lengths)
    table = torch.zeros(batch, most + 2, dtype=torch.int32, device=device)
    at = 0
    pieces: list[list[int]] = []
    for b, (n, _) in enumerate(lengths):
        pieces.append(list(range(at, at + n)))
        for i, block in enumerate(pieces[-1]):
            table[b, i] = block_number(*where[block])
        at += n
    room = size
    held = torch.randn(2, batch, heads, sinks + room, dim, device=device)
    held[1] *= spread
    held = held.to(dtype)
    sink = (held[0, :, :, :sinks].contiguous(), held[1, :, :, :sinks].contiguous())
    tail = (held[0, :, :, sinks:].contiguous(), held[1, :, :, sinks:].contiguous())
    numbers = torch.tensor([(sinks, n, t) for n, t in lengths], dtype=torch.int32, device=device)
    chunks = most * (size // shape.chunk)
    turns = RopeTables.make(
        lambda p: rope(p, dim, factor), shape.chunk, sinks, chunks + size // shape.chunk, table,
        allocated=shape.allocated,
    )  # fmt: skip
    step = DecodeStep(table, numbers, chunks, turns)
    query = torch.randn(batch, heads * group, dim, device=device).to(dtype) * (not column)
    scaling = 1 / math.sqrt(dim)
    logits = torch.linspace(-2, 8, heads * group, device=device) if learned else None
    out = decode_attention(
        replace(shape, soft_cap=soft_cap), query, sink, tail, rows, step, codec.decode_tables,
        scaling, logits,
    ).double()  # fmt: skip
    worst = 0.0
    for b, (_, t) in enumerate(lengths):
        parts = [(sink[0][b], sink[1][b])]
        for block in pieces[b]:
            arena, place = where[block]
            view = arenas[arena].view(slice(place, place + 1))
            k, v = codec.unpack(view, (1, heads, size, dim))
            parts.append((k[0], v[0]))
        parts.append((tail[0][b, :, :t], tail[1][b, :, :t]))
        keys = torch.cat([k.double() for k, _ in parts], 1)
        values = torch.cat([v.double() for _, v in parts], 1)
        cos, sin = rope(torch.arange(keys.shape[1], device=device)[None], dim, factor)
        expected = attention(
            query[b].double(), rotate(keys, cos[0].double(), sin[0].double()), values, scaling,
            soft_cap, logits,
        )  # fmt: skip
        error = (out[b] - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert not error.isnan().any()
        worst = max(worst, float(error.max()))
    return worst
