"""Which columns of a batch are tokens and which padding, and the positions that follow from it.

What a column is, is said once, by the mask of the call that brings it; a later mask that says
otherwise is refused. A decode step on a GPU cannot be looked at without waiting for the device:
there `wrong` says on the device whether its mask fits, which the cache looks at in a later call.
"""

from __future__ import annotations

import torch

from kvquant.cache.late_check import on_device
from kvquant.cache.layout import Span
from kvquant.kernels.blockwise_attention import NEVER


def host_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask `[batch_size, columns]` of 1 and 0 as bools on the host; waits for the device.

    Raises:
        ValueError: It holds other values, as masks that are added to scores do, or no token.
    """
    tokens = mask.bool()
    if mask.dtype is not torch.bool and not torch.equal(tokens.to(mask.dtype), mask):
        raise ValueError("attention_mask: must be 1 for tokens and 0 for padding")
    host = tokens.cpu()
    if not bool(host.any()):
        raise ValueError("attention_mask: a batch without a single token")
    return host


class Padding:
    """The padding of all columns that a cache has seen; without any, it costs nothing."""

    def __init__(self) -> None:
        # int64 [batch_size, columns], tokens up to each column; None as long as all are tokens
        self._counts: torch.Tensor | None = None
        # bool [] on a GPU: whether the last call's mask does not fit what it could not be asked
        self.wrong: torch.Tensor | None = None

    def spans(self, batch: int, new_len: int, total: int, mask: torch.Tensor | None) -> list[Span]:
        """Takes new columns in and says which of them are tokens, for each sequence.

        Args:
            batch: Sequences.
            new_len: New columns.
            total: All columns, the new ones included.
            mask: `[batch_size, total]` with 1 = token, 0 = padding, or None for no padding.

        Raises:
            ValueError: The mask does not cover all columns, has no token, or says of an earlier
                column what its own call did not.
        """
        everything: list[Span] = [slice(0, new_len)] * batch
        self.wrong = None
        if mask is None:
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
            # A decode step: every sequence gets one token, and looking would wait for the device.
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

    def _refuse_changes(self, past: torch.Tensor) -> None:
        """Refuses a mask of the earlier columns, bool on the host, that is not theirs."""
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
        """Positions of the new columns, after :meth:`spans` with the same arguments.

        Args:
            batch: Sequences.
            new_len: New columns.
            total: All columns, the new ones included.
            mask: See :meth:`spans`.
            device: Where the positions shall be.

        Returns:
            int64 `[batch_size, new_len]` as queries, and as keys: `NEVER` for padding, or None for
            a single column, whose query sees its own key.
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
        """Takes in a column that is a token of every sequence."""
        if self._counts is not None:
            last = self._counts[:, -1:] + 1
            self._counts = torch.cat((self._counts, last), 1)

    def select(self, indices: torch.Tensor) -> None:
        """Keeps (or repeats) the given sequences."""
        if self._counts is not None:
            self._counts = self._counts[indices.to(self._counts.device)]

    def crop(self, columns: int) -> list[int] | None:
        """Keeps the first columns.

        Args:
            columns: At least 1.

        Returns:
            Tokens of each sequence in them, or None where they are all tokens.
        """
        if self._counts is None:
            return None
        lengths: list[int] = self._counts[:, columns - 1].tolist()
        self._counts = self._counts[:, :columns]
        return lengths

    def fork(self) -> Padding:
        """A copy that goes on by itself."""
        other = Padding()
        other._counts = self._counts  # never written in place
        return other
