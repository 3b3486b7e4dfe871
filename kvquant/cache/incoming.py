"""Tokens on their way into a block store: put into blocks, and refused if they are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvquant.cache.layout import Span
from kvquant.errors import NonFiniteTokens, UserError


def refuse_changed(names: Sequence[str], held: tuple[Any, ...], found: tuple[Any, ...]) -> None:
    """Refuses tokens of another kind than those that a cache holds.

    Args:
        names: What is compared.
        held: The properties of what the cache holds.
        found: Those of the new tokens.

    Raises:
        UserError: A property differs; the message names it.
    """
    if found == held:
        return
    for name, mine, theirs in zip(names, held, found, strict=True):
        if mine != theirs:
            raise UserError(
                f"cache: {name} {theirs} in this call, but it holds {mine}; go on as it began, "
                "or begin with a new cache"
            )


def fill_blocks(blocks: torch.Tensor, at: int, tokens: torch.Tensor) -> None:
    """Writes `[num_heads, n, head_dim]` from token `at` on into `[blocks, num_heads, size, dim]`.

    It takes at most three copies: the rest of a begun block, whole blocks, the start of another.
    """
    size, n, done = blocks.shape[2], tokens.shape[1], 0
    if at % size:
        done = min(size - at % size, n)
        blocks[at // size, :, at % size : at % size + done] = tokens[:, :done]
    whole = (n - done) // size
    if whole:
        first = (at + done) // size
        part = tokens[:, done : done + whole * size].unflatten(1, (whole, size))
        blocks[first : first + whole] = part.transpose(0, 1)
        done += whole * size
    if done < n:
        blocks[(at + done) // size, :, : n - done] = tokens[:, done:]


def refuse_infinite(spans: list[Span], keys: torch.Tensor, values: torch.Tensor) -> None:
    """Refuses tokens that 16 bits cannot hold, which would make every later output NaN.

    Raises:
        NonFiniteTokens: Keys or values of a token are not finite. Padding may hold anything.
    """
    for name, x in (("keys", keys), ("values", values)):
        if bool(x.isfinite().all()):
            continue
        if not all(bool(x[b][:, span].isfinite().all()) for b, span in enumerate(spans)):
            raise NonFiniteTokens(name)
