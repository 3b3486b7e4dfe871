"""Tracks which columns of a batch are tokens and which are padding, and derives positions.

The mask of the call that brings a column decides what it is, and a later mask that contradicts it
is refused. The mask of a decode step on a GPU cannot be read without waiting for the device. There
`wrong` is computed on the device, and the cache reads it in a later call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvquant.cache.late_check import on_device
from kvquant.cache.layout import Span
from kvquant.kernels.blockwise_attention import NEVER


def host_mask(mask: torch.Tensor) -> torch.Tensor:
    """Copies a mask `[batch_size, columns]` of 1 and 0 to the host; waits for the device.

    Raises:
        ValueError: The mask holds other values, as masks that are added to scores do, or no token.
    """
    tokens = mask.bool()
    if mask.dtype is not torch.bool and not torch.equal(tokens.to(mask.dtype), mask):
        raise ValueError("attention_mask: must be 1 for tokens and 0 for padding")
    host = tokens.cpu()
    if not bool(host.any()):
        raise ValueError("attention_mask: a batch without a single token")
    return host


class Padding:
    """The padding of all columns that a cache has seen; a batch without any costs nothing."""

    def __init__(self) -> None:
        # int64 [batch_size, columns], number of tokens up to each column; None if all are tokens
        self._counts: torch.Tensor | None = None
        # bool [] on a GPU: whether the mask of the last decode step was wrong; None: checked
        self.wrong: torch.Tensor | None = None

    @property
    def any(self) -> bool:
        """Whether any column is padding."""
        return self._counts is not None

    def spans(self, batch: int, new_len: int, total: int, mask: torch.Tensor | None) -> list[Span]:
        """Adds new columns and returns which of them are tokens in each sequence.

        Args:
            batch: Number of sequences.
            new_len: Number of new columns.
            total: Number of all columns, the new ones included.
            mask: `[batch_size, total]` with 1 = token, 0 = padding, or None for no padding.

        Raises:
            ValueError: The mask does not cover all columns, has no token, or contradicts an earlier
                call's mask.
        """
        everything: list[Span] = [slice(0, new_len)] * batch
        self.wrong = None
        if mask is None:
            self._forget_if_whole()
            if self._counts is not None:
                raise ValueError("attention_mask: needed for every call of a padded batch")
            return everything
        if mask.dim() != 2 or tuple(mask.shape) != (batch, total):
            raise ValueError(
                f"attention_mask: shape {tuple(mask.shape)}, expected {(batch, total)} "
                "(tokens so far and new ones)"
            )
        tokens = mask.bool()
        if new_len == 1 and total > 1 and on_device(mask):
            # A decode step: each sequence gets one token; reading the mask would block the host.
            if self._counts is None:
                self.wrong = ~tokens.all()
            else:
                counts = tokens.long().cumsum(1)
                expected = torch.cat((self._counts, self._counts[:, -1:] + 1), 1)
                self.wrong = (counts != expected).any()
                self._counts = counts
            return everything
        host = host_mask(mask)
        whole, past = bool(host.all()), total - new_len
        if whole and self._counts is None:
            return everything
        counts, old = tokens.long().cumsum(1), self._counts
        same = old is not None and old.device == counts.device
        if old is None or not same or not torch.equal(counts[:, :past], old):
            self._refuse_changes(host[:, :past])
        if whole:
            self._counts = None
            return everything
        self._counts = counts
        if new_len == 1:
            return [slice(0, int(token)) for token in host[:, past].tolist()]
        spans: list[Span] = []
        for row in host[:, total - new_len :]:
            where = row.nonzero().view(-1)
            if not where.numel():
                spans.append(slice(0, 0))
            elif int(where[-1] - where[0]) + 1 == where.numel():
                spans.append(slice(int(where[0]), int(where[-1]) + 1))
            else:
                spans.append(where.to(mask.device))
        return spans

    def _forget_if_whole(self) -> None:
        """Forgets the counts if all columns are tokens, as after a choice of sequences or a cut.

        Waits for the device of the counts.
        """
        if self._counts is not None and bool((self._counts[:, -1] == self._counts.shape[1]).all()):
            self._counts = None

    def _refuse_changes(self, past: torch.Tensor) -> None:
        """Refuses a mask of earlier columns (bool, on the host) that contradicts their own."""
        known = torch.ones_like(past)
        if self._counts is not None:
            counts = self._counts.cpu()
            known = counts.diff(dim=1, prepend=torch.zeros_like(counts[:, :1])) > 0
        if torch.equal(past, known):
            return
        row, column = (past != known).nonzero()[0].tolist()
        now, then = ("padding", "a token") if known[row, column] else ("a token", "padding")
        raise ValueError(
            f"attention_mask: column {column} of sequence {row} was {then} in an earlier call and "
            f"is {now} now; what is stored cannot be hidden or shown: keep the earlier columns"
        )

    def positions(
        self, batch: int, new_len: int, total: int, mask: torch.Tensor | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns positions of the new columns, after :meth:`spans` with the same arguments.

        Args:
            batch: Number of sequences.
            new_len: Number of new columns.
            total: Number of all columns, the new ones included.
            mask: See :meth:`spans`.
            device: Device of the positions.

        Returns:
            int64 `[batch_size, new_len]` each, for queries and for keys. Those for keys are `NEVER`
            at padding, and None for a single column, whose query sees its own key.
        """
        past = total - new_len
        if self._counts is None:
            queries = torch.arange(past, total, device=device).expand(batch, -1)
        else:
            queries = (self._counts[:, past:] - 1).clamp_(min=0).to(device)
        if new_len == 1:
            return queries, None
        if mask is not None and self._counts is not None:
            return queries, torch.where(mask[:, past:].bool().to(queries.device), queries, NEVER)
        return queries, queries

    def count_token(self) -> None:
        """Adds a column that is a token in every sequence."""
        if self._counts is not None:
            last = self._counts[:, -1:] + 1
            self._counts = torch.cat((self._counts, last), 1)

    def take_over(
        self, others: Sequence[tuple[Padding, int, int]], batch: int, columns: int
    ) -> int:
        """Appends the sequences of other batches; the shorter ones are padded on the left.

        Args:
            others: Padding of each batch, with its number of sequences and of columns.
            batch: Number of sequences of this batch.
            columns: Number of columns of this batch.

        Returns:
            Number of columns of the joined batch.
        """
        every = [(self, batch, columns), *others]
        longest = max(part[2] for part in every)
        if any(part._counts is not None or own < longest for part, _, own in every):
            rows = [part._padded(count, own, longest) for part, count, own in every]
            device = next((p._counts.device for p, *_ in every if p._counts is not None), None)
            self._counts = torch.cat([row if device is None else row.to(device) for row in rows])
        return longest

    def _padded(self, batch: int, columns: int, longest: int) -> torch.Tensor:
        """Returns the counts of a batch that is padded on the left to `longest` columns."""
        counts = self._counts
        if counts is None:
            counts = torch.arange(1, columns + 1).expand(batch, -1)
        return torch.nn.functional.pad(counts, (longest - columns, 0))

    def select(self, indices: torch.Tensor) -> None:
        """Keeps or repeats the given sequences."""
        if self._counts is not None:
            self._counts = self._counts[indices.to(self._counts.device)]

    def crop(self, columns: int) -> list[int] | None:
        """Keeps the first columns.

        Args:
            columns: Number of columns to keep, at least 1.

        Returns:
            Number of tokens of each sequence in them, or None where all columns are tokens.
        """
        if self._counts is None:
            return None
        lengths: list[int] = self._counts[:, columns - 1].tolist()
        self._counts = self._counts[:, :columns]
        return lengths

    def fork(self) -> Padding:
        """Returns an independent copy."""
        other = Padding()
        other._counts = self._counts  # never written in place
        return other
