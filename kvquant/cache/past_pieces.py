"""Cuts the past into pieces that attention reads one after the other, once per call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kvquant.cache.layout import Gather, Layout, View
from kvquant.formats.rope import Rope
from kvquant.kernels.blockwise_attention import NEVER

# Limits of a piece: tokens per sequence, and elements of its scores.
MAX_TOKENS = 4096
MAX_SCORES = 1 << 26

Part = Literal["sinks", "blocks", "tail"]


@dataclass(frozen=True)
class Piece:
    """A part of the past that attention reads at a time, the same for all layers of a call.

    Attributes:
        part: "sinks", "blocks" or "tail".
        columns: Number of keys of the piece per sequence.
        gathers: The places of its blocks.
        positions: int64 `[batch_size, columns]`, or None if every query sees every key.
        rope: Rotary table of the keys, `[1 or batch_size, columns, head_dim]` each.
    """

    part: Part
    columns: int
    gathers: list[Gather]
    positions: torch.Tensor | None
    rope: tuple[torch.Tensor, torch.Tensor]


def cut_past(
    layout: Layout,
    view: View,
    rope: Rope,
    queries: torch.Size,
    device: torch.device,
    *,
    causal: bool,
) -> list[Piece]:
    """Cuts the past that a call reads so that the scores of each piece stay small.

    Args:
        layout: Layout of the cache.
        view: The state that is read.
        rope: Maps positions `[1, n]` to the rotary table `(cos, sin)`, each
            `[1 or batch_size, n, head_dim]`.
        queries: Shape of the queries, `(batch_size, num_heads, q_len, head_dim)`.
        device: Device of the pieces' tables.
        causal: Whether a query sees only keys at its position or before, so that positions are
            needed even where all sequences have one length.
    """
    longest, sinks, size = max(view.lengths), layout.sinks, layout.block_size
    positions = torch.arange(longest, device=device)
    cos, sin = rope(positions[None])
    lengths = torch.tensor(view.lengths).to(device, non_blocking=True)[:, None]
    out = []

    def piece(part: Part, first: int, columns: int, gathers: list[Gather], even: bool) -> None:
        where = slice(first, first + columns)
        keys: torch.Tensor | None = None
        if causal or not even:
            keys = torch.where(positions[where] < lengths, positions[where], NEVER)
        out.append(Piece(part, columns, gathers, keys, (cos[:, where], sin[:, where])))

    if sinks and longest:
        columns = min(sinks, longest)
        piece("sinks", 0, columns, [], min(view.lengths) >= columns)
    step = max(1, min(MAX_TOKENS, MAX_SCORES // math.prod(queries[:3])) // size)
    for first in range(0, max(view.blocks), step):
        stop = min(first + step, max(view.blocks))
        gathers = layout.gather(view, first, stop, device)
        even = min(view.blocks) >= stop
        begin = sinks + first * size
        if even:
            piece("blocks", begin, (stop - first) * size, gathers, True)
            continue
        where = positions[begin : begin + (stop - first) * size]
        packed = torch.tensor(view.blocks).to(device, non_blocking=True)[:, None] * size + sinks
        keys = torch.where(where < packed, where, NEVER)
        table = (cos[:, where], sin[:, where])
        out.append(Piece("blocks", where.numel(), gathers, keys, table))
    if max(view.tails):
        columns = max(view.tails)
        starts = [n - t for n, t in zip(view.lengths, view.tails, strict=True)]
        if len(set(starts)) == 1:
            piece("tail", starts[0], columns, [], len(set(view.tails)) == 1)
        else:
            begins = torch.tensor(starts).to(device, non_blocking=True)[:, None]
            at = begins + torch.arange(columns, device=device)
            keys = torch.where(at < lengths, at, NEVER)
            at = at.clamp(max=longest - 1)
            turned = [
                x.expand(len(starts), -1, -1).take_along_dim(at[..., None], 1) for x in (cos, sin)
            ]
            out.append(Piece("tail", columns, [], keys, (turned[0], turned[1])))
    return out
