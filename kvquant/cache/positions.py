"""Checks whether the positions of a call continue those in a cache.

A cache counts the tokens of each sequence. Rotary embeddings depend on distances alone, so that
positions may differ from that count by a shift per sequence, as long as every call has the same
shift. Transformers' default positions of a left-padded batch do so, because they count padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.cache.layout import Span


@dataclass(frozen=True)
class Shifts:
    """The differences between token positions and token counts, per sequence.

    Attributes:
        known: The shift of each sequence; 0 as long as it has no token.
        open: Whether no call has given positions so far. The shift is then transformers' default,
            which a later call with counted positions does not contradict.
    """

    known: list[int]
    open: bool

    @property
    def zero(self) -> bool:
        """Whether all shifts are 0."""
        return not any(self.known)

    def follow(self, new: list[int | None], lengths: list[int], given: bool) -> Shifts | None:
        """Returns the shifts after a call, or None if the call does not continue them.

        Args:
            new: Shifts of the call's tokens; None where a sequence has no new token.
            lengths: Tokens of each sequence before the call.
            given: Whether the caller gave the positions.

        Returns:
            The shifts, or None if a sequence has earlier tokens with another shift.
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
        """Returns the shifts of the given sequences."""
        return Shifts([self.known[i] for i in order], self.open)


def check_batch(positions: torch.Tensor | None, batch: int, new_len: int, sequences: int) -> None:
    """Refuses a call whose batch does not fit its positions or the cache.

    Args:
        positions: `[1 or batch_size, new_len]`, or None.
        batch: Number of sequences of the call.
        new_len: Number of new columns.
        sequences: Number of sequences in the cache; -1 or 0 before its first call.

    Raises:
        ValueError: The number of sequences or columns differs.
    """
    if positions is not None and tuple(positions.shape) not in ((1, new_len), (batch, new_len)):
        raise ValueError(
            f"position_ids: shape {tuple(positions.shape)}, expected {(batch, new_len)}"
        )
    if sequences > 0 and batch != sequences:
        raise ValueError(
            f"input_ids: a batch of {batch}, but the cache holds {sequences}; give it as many by "
            "batch_repeat_interleave or batch_select_indices"
        )


def shifts(
    positions: torch.Tensor, spans: list[Span], lengths: list[int]
) -> list[int | None] | None:
    """Returns by how much the positions of new tokens exceed their indices in their sequences.

    Waits for the device of the positions.

    Args:
        positions: int64 `[1 or batch_size, new_len]`; those of padding do not matter.
        spans: Columns of each sequence that are tokens.
        lengths: Tokens of each sequence before the call.

    Returns:
        One shift per sequence, None where it has no new token. None instead of the list if the
        tokens of a sequence have different shifts.
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
    """Returns the first of consecutive positions, or None if they are not consecutive."""
    first = int(row[0])
    if row.numel() > 1 and bool((row.diff() != 1).any()):
        return None
    return first
