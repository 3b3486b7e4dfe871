"""Whether the positions of a call go on from those in a cache.

A cache counts the tokens of each sequence. Rotary embedding sees distances alone, so positions that
are that count plus a shift of the sequence are as good, as long as every call has the same shift;
transformers' default positions of a left-padded batch are such, as they count padding, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.cache.layout import Span


@dataclass(frozen=True)
class Shifts:
    """How far the positions of each sequence's tokens are from their count.

    Attributes:
        known: Of each sequence; 0 as long as it has no token.
        open: Whether no call has given positions so far; the shift is then transformers' default,
            which says nothing that a call with counted positions could contradict.
    """

    known: list[int]
    open: bool

    @property
    def zero(self) -> bool:
        """Whether positions are the count."""
        return not any(self.known)

    def follow(self, new: list[int | None], lengths: list[int], given: bool) -> Shifts | None:
        """The shifts after a call.

        Args:
            new: Shifts of the call's tokens; None where a sequence has none.
            lengths: Tokens of each sequence before.
            given: Whether the caller gave the positions.

        Returns:
            None if a sequence's tokens do not go on from its earlier ones.
        """
        if self.open and given and not any(new):
            return Shifts([0] * len(new), False)
        known = list(self.known)
        for row, shift in enumerate(new):
            if shift is None:
                continue
            if lengths[row] and shift != known[row]:
                return None
            known[row] = shift
        return Shifts(known, self.open and not given)

    def select(self, order: list[int]) -> Shifts:
        """Those of the given sequences."""
        return Shifts([self.known[i] for i in order], self.open)


def check_batch(positions: torch.Tensor | None, batch: int, new_len: int, sequences: int) -> None:
    """Refuses a call that does not fit its positions or the cache.

    Args:
        positions: `[1 or batch_size, new_len]`, or None.
        batch: Sequences of the call.
        new_len: New columns.
        sequences: In the cache; -1 or 0 before its first call.

    Raises:
        ValueError: Another number of sequences or columns.
    """
    if positions is not None and tuple(positions.shape) not in ((1, new_len), (batch, new_len)):
        raise ValueError(
            f"position_ids: shape {tuple(positions.shape)}, expected {(batch, new_len)}"
        )
    if sequences > 0 and batch != sequences:
        raise ValueError(f"input_ids: a batch of {batch}, but the cache holds {sequences}")


def shifts(
    positions: torch.Tensor, spans: list[Span], lengths: list[int]
) -> list[int | None] | None:
    """By how much the positions of new tokens exceed their numbers in their sequences.

    Waits for the device where they are.

    Args:
        positions: int64 `[1 or batch_size, new_len]`; those of padding do not matter.
        spans: Columns of each sequence that are tokens.
        lengths: Tokens of each sequence before.

    Returns:
        An entry per sequence, None where it has no new token; None if a sequence has no one shift.
    """
    host = positions.cpu()
    every = slice(0, host.shape[1])
    if host.shape[0] == 1 and all(isinstance(span, slice) and span == every for span in spans):
        shift = _shift(host[0])
        return None if shift is None else [shift - n for n in lengths]
    if host.shape == (len(spans), 1) and all(isinstance(span, slice) for span in spans):
        column = host[:, 0].tolist()
        return [
            new - n if span == every else None
            for new, n, span in zip(column, lengths, spans, strict=True)
        ]
    found: list[int | None] = []
    for b, (span, length) in enumerate(zip(spans, lengths, strict=True)):
        row = host[b if host.shape[0] > 1 else 0]
        row = row[span if isinstance(span, slice) else span.to(row.device)]
        if not row.numel():
            found.append(None)
            continue
        shift = _shift(row)
        if shift is None:
            return None
        found.append(shift - length)
    return found


def _shift(row: torch.Tensor) -> int | None:
    """The first of consecutive positions, or None if they are not consecutive."""
    first = int(row[0])
    if row.numel() > 1 and bool((row.diff() != 1).any()):
        return None
    return first
