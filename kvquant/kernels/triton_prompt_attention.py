"""Attention of many queries by a Triton kernel: scores of INT8 products, values in 16 bits.

It takes the shapes and GPUs that the CUDA kernel (`cuda/prompt_attention.cu`) does not. Operands
are those of :mod:`kvquant.kernels.triton_prompt_pack`, not swizzled; values, and queries and keys
of fine tiles, are read as they were given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvquant.kernels.cuda_prompt_attention import QUERIES
from kvquant.kernels.eight_bit_attention import TILE
from kvquant.kernels.triton_prompt_attention_kernels import _attend_prompt

if TYPE_CHECKING:
    from kvquant.kernels.triton_prompt_pack import Keys, Queries


class Tiles(NamedTuple):
    """Sizes of the kernel, to tune.

    Attributes:
        rows: Queries of a program.
        keys: Keys that it reads at a time, a divisor of `TILE`.
        warps: Warps of a program.
        stages: Tiles of keys on their way.
    """

    rows: int
    keys: int
    warps: int
    stages: int


TILES = {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)}


def launch(
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    queries: Queries,
    keys: Keys,
    scaling: float,
    order: torch.Tensor | None,
    query_columns: torch.Tensor | None,
    key_columns: torch.Tensor | None,
    out: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    window: int | None,
    *,
    first: bool,
    last: bool,
) -> None:
    """Attends to a part of the keys.

    Args:
        given: Queries `[batch_size, num_heads, q_len, head_dim]`, keys and values
            `[batch_size, num_kv_heads, kv_len, head_dim]`, 16 bits.
        queries: Quantized queries, with offsets.
        keys: Quantized keys.
        scaling: Factor of the scores.
        order: int32 `[num_kv_heads, head_dim]`, the channels of keys in the order in which they
            lie; None where it is their own.
        query_columns: The columns of the queries' tokens; None: their numbers.
        key_columns: The columns of the keys' tokens; None: their numbers.
        out: `[batch_size, q_len, num_heads, head_dim]`, written with `last`.
        state: Output, maximum and sum of every row so far; None for a single part.
        window: A row sees so many keys, itself included; None: all before it.
        first: Whether no part came before.
        last: Whether none comes behind.
    """
    assert queries.offsets is not None
    given_queries, given_keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in given)
    batch, columns, heads, dim = out.shape
    tiles, room = TILES[dim], queries.scales.shape[2] * QUERIES
    counts = keys.counts
    held = (queries.scales,) * 3 if state is None else state
    tables = [counts if t is None else t for t in (order, query_columns, key_columns)]
    _attend_prompt[(-(-room // tiles.rows), heads, batch)](
        given_queries, given_keys, values, queries.queries[0], keys.keys[0], queries.scales,
        queries.offsets, keys.key_scales, counts, *tables, out, *held,
        scaling * math.log2(math.e), columns, tables[1].stride(0), tables[2].stride(0),
        keys.key_scales.shape[2], window or 0, *given_queries.stride()[:3],
        *given_keys.stride()[:3], *values.stride()[:3],
        heads // keys.key_scales.shape[1], dim, tiles.rows, tiles.keys, TILE, order is not None,
        query_columns is not None, key_columns is not None, window is not None, first, last, room,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
