"""How Python, CUDA and Triton name packed blocks: block numbers and the table of arenas.

This module is the only place that knows the encodings. Python encodes; the CUDA kernels read the
constants of :func:`cuda_constants` in a generated header, and the Triton kernels read the Python
names.

A block lies at a place of an arena. Its *block number* holds both in one int32, the place in the
lower bits. A layer's *arena table* has a row of addresses per arena, one column per field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PLACE_BITS = 20
ARENA_BITS = 11  # with the place's bits 31, so that a block number is never negative
MAX_ARENAS, MAX_PLACES = 1 << ARENA_BITS, 1 << PLACE_BITS

# Columns of the arena table: codes of keys and values and the values' ranges, then four index and
# data arrays of the keys' outliers, then those of the values' outliers.
DENSE_FIELDS = ("key_codes", "value_codes", "value_zeros", "value_scales")
OUTLIER_FIELDS = ("begin", "count", "positions", "outliers")
ARENA_FIELDS = (
    *DENSE_FIELDS,
    *(f"{side}_{field}" for side in ("key", "value") for field in OUTLIER_FIELDS),
)


def block_number(arena: int, place: int) -> int:
    """Returns the number of the block at a place of an arena.

    Raises:
        ValueError: The arena or the place does not fit in a block number.
    """
    if not (0 <= arena < MAX_ARENAS and 0 <= place < MAX_PLACES):
        raise ValueError(f"block number: arena {arena}, place {place} do not fit in 31 bits")
    return arena << PLACE_BITS | place


def block_numbers(
    sequences: Sequence[Sequence[tuple[int, int]]], blocks: Sequence[int]
) -> torch.Tensor:
    """Returns the sequences' block numbers, an int32 tensor `[batch_size, most blocks]` on the CPU.

    Backends refuse what has no number (:mod:`kvquant.kernels.limits`); this loop runs in the decode
    path and checks nothing.

    Args:
        sequences: Arena and place of each block of each sequence.
        blocks: How many blocks of each sequence are taken; the rest of a row is zero.
    """
    longest = max(blocks)
    rows = [
        [arena << PLACE_BITS | place for arena, place in places[:n]] + [0] * (longest - n)
        for places, n in zip(sequences, blocks, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int32)


def cuda_constants() -> str:
    """Returns C++ definitions that the CUDA kernels decode block numbers and arena rows with."""
    fields = ", ".join(field.upper() for field in ARENA_FIELDS)
    return (
        f"constexpr int PLACE_BITS = {PLACE_BITS};\n"
        f"enum ArenaField {{ {fields}, NUM_ARENA_FIELDS }};\n"
    )
