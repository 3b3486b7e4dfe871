"""Tracks over the forward calls by which rotary table the tokens of a cache are rotated.

Normally a token's position is its index in its sequence, plus a shift per sequence
(:mod:`kvquant.cache.positions`), and one rotary table serves all tokens. Where positions do not
continue those before, the rotation of each token is kept
(:class:`kvquant.cache.kept_rope.KeptRope`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvquant.cache.kept_rope import KeptRope, Table
from kvquant.cache.late_check import on_device
from kvquant.cache.layout import Span
from kvquant.cache.positions import Shifts, shifts
from kvquant.formats.rope import Rope


class CallRope:
    """The rotation of stored tokens and of the current call, shared by all layers.

    Args:
        rope: Maps positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`.
        keep: Whether to keep the rotation of each token from the start.
        rotated: Whether keys are stored after RoPE, so that they already include it.
        local: `rope` of layers with a sliding window, which may have another base; None if there is
            no such layer.

    Attributes:
        counted: `rope`.
        kept: Rotations of all tokens; None where positions are counted.
    """

    def __init__(self, rope: Rope, *, keep: bool, rotated: bool, local: Rope | None = None) -> None:
        self.counted = rope
        self.local = local
        self._keep = keep and not rotated
        self._rotated = rotated
        self.kept: KeptRope | None = KeptRope() if self._keep else None
        self._shifts: Shifts | None = None  # before the first call
        self._default_ends = False  # whether the model's default positions would be wrong
        # State of the current call: the devices whose first layer has brought the rotary table to
        # keep, and the table of counted positions where the model's is shifted.
        self._taken: set[torch.device] = set()
        self._table: Table | None = None
        self._local_table: Table | None = None

    @property
    def counts(self) -> bool:
        """Whether the position of each token is its index in its sequence."""
        return self.kept is None and (self._shifts is None or self._shifts.zero)

    @property
    def read(self) -> Rope:
        """The function from token indices `[1, n]` to the rotary table for reading their keys."""
        return self.counted if self.kept is None else self.kept.read

    def begin(
        self,
        positions: torch.Tensor | None,
        given: bool,
        spans: list[Span],
        lengths: list[int],
        counted: torch.Tensor,
    ) -> torch.Tensor | None:
        """Determines how the new tokens of a call are rotated.

        Args:
            positions: int64 `[1 or batch_size, new_len]` of the new columns, or None: counted.
            given: Whether the caller of the model gave the positions; else they are its default.
            spans: Columns of each sequence that are tokens.
            lengths: Tokens of each sequence before the call; empty before the first call.
            counted: int64 `[batch_size, new_len]`, the index of each new column in its sequence.

        Returns:
            bool `[]`, whether the positions of a decode step on a GPU fail to continue those
            before; None if that is known on the host.
        """
        self._taken.clear()
        self._table = self._local_table = None
        if self._default_ends and not given:
            raise ValueError(
                "position_ids: needed for every call on joined prompts of different lengths, whose "
                "default positions would count padding"
            )
        if positions is None or self._rotated or self.kept is not None:
            return None
        lengths = lengths or [0] * len(spans)
        old = self._shifts or Shifts([0] * len(spans), True)
        device, wrong = counted.device, None
        if (
            on_device(positions)
            and positions.shape[1] == 1
            and all(lengths)
            and (old.zero or not old.open)
        ):  # a decode step: reading positions would wait for the device
            moved = positions - counted
            if not old.zero:
                moved = moved - torch.tensor(old.known).to(device, non_blocking=True)[:, None]
            wrong = moved.any()
            self._shifts = Shifts(old.known, False)
        else:
            new = shifts(positions, spans, lengths)
            self._shifts = None if new is None else old.follow(new, lengths, given)
            if self._shifts is None:
                if self.local is not None and any(old.known):
                    raise ValueError(
                        "position_ids: do not continue those of earlier calls, by which the keys "
                        "of sliding-window layers are rotated; give positions that go on by one"
                    )
                self.kept = KeptRope.counted(self.counted, lengths, old.known, device)
                return None
            if new is not None and not any(new):
                return None
        if not self._shifts.zero:
            self._table = self.counted(counted)
            if self.local is not None:
                same = self.local is self.counted
                self._local_table = self._table if same else self.local(counted)
        return wrong

    def table(
        self, rope: Table, spans: list[Span], lengths: list[int], dtype: torch.dtype
    ) -> Table | None:
        """Returns the rotary table of the new columns, or None where it is the model's.

        Args:
            rope: The model's table, `[1 or batch_size, new_len, head_dim]` each, on the device of
                the layers that ask; kept there if needed.
            spans: Columns of each sequence that are tokens.
            lengths: Tokens of each sequence before the call.
            dtype: The dtype of the queries.

        Returns:
            Cosine and sine, `[batch_size, new_len, head_dim]` each, or None.
        """
        device = rope[0].device
        if self.kept is not None and device not in self._taken:
            self.kept.append(rope, spans, lengths)
            self._taken.add(device)
        if self._table is None:
            return None
        cos, sin = (x.to(device, dtype, non_blocking=True) for x in self._table)
        return cos, sin

    @property
    def window_table(self) -> Table | None:
        """The table of the new columns in layers with a sliding window; None: the model's."""
        return self._local_table

    def state(self) -> tuple[KeptRope | None, Shifts | None]:
        """Returns the state for :meth:`restore`; take it before a call begins."""
        return self.kept, self._shifts

    def restore(self, state: tuple[KeptRope | None, Shifts | None]) -> None:
        """Restores a state, which undoes a call that has stored nothing."""
        self.kept, self._shifts = state

    def take_over(
        self, others: Sequence[CallRope], lengths: Sequence[int], *, padded: bool
    ) -> None:
        """Appends the sequences of other caches, whose positions are counted as here.

        Args:
            others: Their rotations.
            lengths: Number of sequences of this cache and of each other one.
            padded: Whether sequences are padded now that were not before, so that default positions
                no longer go on from theirs.
        """
        every = [self, *others]
        self._default_ends = padded or any(rope._default_ends for rope in every)
        if any(rope._shifts is not None for rope in every):
            parts = [
                rope._shifts or Shifts([0] * n, True)
                for rope, n in zip(every, lengths, strict=True)
            ]
            # An open shift is closed as by a call that gives counted positions.
            all_open = all(part.open for part in parts)
            known = [
                0 if part.open and not all_open else shift for part in parts for shift in part.known
            ]
            self._shifts = Shifts(known, all_open)

    def select(self, indices: torch.Tensor, order: list[int]) -> None:
        """Keeps or repeats the given sequences; `order` is `indices` on the host."""
        if self.kept is not None:
            self.kept.select(indices)
        if self._shifts is not None:
            self._shifts = self._shifts.select(order)

    def empty(self) -> CallRope:
        """Returns the rotation of an empty cache with the same settings."""
        return CallRope(self.counted, keep=self._keep, rotated=self._rotated, local=self.local)

    def fork(self) -> CallRope:
        """Returns an independent copy."""
        other = self.empty()
        other.kept = None if self.kept is None else self.kept.fork()
        other._shifts, other._default_ends = self._shifts, self._default_ends
        return other
