"""Puts what a cache has read back in the order in which 8-bit attention wants it.

That attention is causal by column: the last columns are those of the call, and all before them are
seen by every query. Tokens of the past may be in any order and with gaps, which a mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvquant.cache.forward_plan import ForwardPlan
from kvquant.cache.past_pieces import Piece

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def whole_columns(
    plan: ForwardPlan,
    pieces: Sequence[Piece],
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
) -> Columns:
    """Returns all keys and values that a call attends to, and which of them are tokens.

    Args:
        plan: The plan of the call.
        pieces: What was read back.
        keys: Rotated keys of each piece, `[batch_size, num_kv_heads, columns, head_dim]`.
        values: Values of each piece, the same shapes.
        own: Rotated keys and values of the call's columns before quantization, used by protocol A.

    Returns:
        Keys and values `[batch_size, num_kv_heads, n, head_dim]`, the call's own columns last, and
        bool `[batch_size, n]`; None where all are tokens.
    """
    columns = plan.token_positions
    mine = None if columns is None else columns >= 0
    if plan.simulated:
        return _read_back(plan, pieces, torch.cat(keys, 2), torch.cat(values, 2), mine)
    k, v = torch.cat((*keys, own[0]), 2), torch.cat((*values, own[1]), 2)
    if mine is None and all(piece.positions is None for piece in pieces):
        return k, v, None
    batch, new_len = plan.query_positions.shape
    seen = [_seen(piece, batch, plan.device) for piece in pieces]
    mine = _all(batch, new_len, plan.device) if mine is None else mine
    return k, v, torch.cat((*seen, mine), 1)


def _all(batch: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.ones((batch, columns), dtype=torch.bool, device=device)


def _seen(piece: Piece, batch: int, device: torch.device) -> torch.Tensor:
    """Returns bool `[batch_size, columns]`: which columns of a piece are tokens."""
    if piece.positions is None:
        return _all(batch, piece.columns, device)
    return piece.positions >= 0


def _read_back(
    plan: ForwardPlan,
    pieces: Sequence[Piece],
    keys: torch.Tensor,
    values: torch.Tensor,
    mine: torch.Tensor | None,
) -> Columns:
    """Returns the columns under protocol B, whose own tokens are among those that were read back.

    Args:
        plan: The plan of the call.
        pieces: What was read back, with positions.
        keys: All of it, `[batch_size, num_kv_heads, n, head_dim]`.
        values: The same shape.
        mine: Which of the call's own columns are tokens; None: all.
    """
    given = [piece.positions for piece in pieces if piece.positions is not None]
    at = torch.cat(given, 1)
    assert at.shape[1] == keys.shape[2] and plan.new_positions is not None
    longest = max(plan.view.lengths)
    slots = at.new_zeros((at.shape[0], longest + 1))  # the last place is for what is no token
    numbers = torch.arange(at.shape[1], device=at.device).expand_as(at)
    slots.scatter_(1, torch.where(at >= 0, at, longest), numbers)
    slot = slots.gather(1, plan.new_positions.clamp(min=0))[:, None, :, None]
    own_k, own_v = (
        x.gather(2, slot.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values)
    )
    if plan.first:
        return own_k, own_v, mine
    before = torch.tensor(plan.append.before.lengths).to(at.device, non_blocking=True)[:, None]
    if mine is None:
        mine = _all(own_k.shape[0], own_k.shape[2], at.device)
    valid = torch.cat(((at >= 0) & (at < before), mine), 1)
    return torch.cat((keys, own_k), 2), torch.cat((values, own_v), 2), valid
