"""Plans what the layers with a sliding window do in a call, once for all of them.

Such a layer keeps its last tokens in a ring: token `t` of a sequence lies in column
`t % capacity`. The ring grows with the sequences until it has room for the window and `ROLLBACK`
more tokens, so that a few tokens can be taken back (:meth:`Windows.check_crop`), as speculative
decoding does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvquant.cache.device_copies import DeviceCopies
from kvquant.cache.kept_rope import Table
from kvquant.cache.layout import Span
from kvquant.errors import UserError
from kvquant.kernels.blockwise_attention import NEVER

ROLLBACK = 64  # tokens that can be taken back once the window is full
GROWTH = 8  # a ring that is too small grows by 1/GROWTH of its columns, and by ROLLBACK at least
MAX_QUERIES = 1024  # that attend at a time


def ring_capacity(window: int, held: int, tokens: int) -> int:
    """Returns the columns of a ring after a call.

    Args:
        window: Number of tokens that a query sees, itself included.
        held: Columns before the call; 0 if there is no ring.
        tokens: Tokens of the longest sequence after the call.
    """
    if tokens <= held:
        return held
    room = window + ROLLBACK
    return min(room, max(tokens, held + max(ROLLBACK, held // GROWTH)) if held else tokens)


@dataclass(frozen=True)
class WindowPart:
    """Some queries of a call, and the keys that they see.

    Attributes:
        queries: Their columns.
        held: Columns of the ring whose keys come first; 0 where none is in reach.
        own: Columns of the call whose keys follow.
        mask: bool `[1 or batch_size, 1, queries, keys]`.
    """

    queries: slice
    held: int
    own: slice
    mask: torch.Tensor


@dataclass(frozen=True)
class WindowPlan:
    """The plan of one call for all layers with a sliding window.

    Attributes:
        window: Number of tokens that a query sees, itself included.
        capacity: Columns of each ring after the call.
        held: Columns of each ring that hold tokens before the call.
        spans: Columns of each sequence that are tokens.
        before: Tokens of each sequence before the call.
        after: Tokens of each sequence after the call.
        queries: int64 `[batch_size, new_len]`, positions of the new queries.
        keys: Positions of the new keys, `NEVER` at padding; None for a single column, whose query
            sees its own key.
        first: Whether the model's own attention takes the call: it is the first, and its mask,
            which counts columns, hides the same tokens.
        step: Whether each sequence gets exactly one token, so that no length is read on the host.
        simulated: Whether the call's own tokens are read as they are stored (protocol B).
        rope: Rotary table of the new columns, or None where it is the model's.
    """

    window: int
    capacity: int
    held: int
    spans: list[Span]
    before: list[int]
    after: list[int]
    queries: torch.Tensor
    keys: torch.Tensor | None
    first: bool
    step: bool
    simulated: bool
    rope: Table | None

    def copied(self, copies: DeviceCopies) -> WindowPlan:
        """Returns the plan for the layers of another device."""
        return replace(
            self,
            spans=copies.of_spans(self.spans),
            queries=copies.of(self.queries),
            keys=copies.of_any(self.keys),
            rope=copies.of_table(self.rope),
        )

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """The column of a step's token in each ring, int64 `[batch_size, 1, 1, 1]`."""
        return (self.queries % self.capacity)[:, :, None, None]

    @functools.cached_property
    def step_columns(self) -> int:
        """The columns that a step reads after its token is stored; others hold no token yet."""
        return min(self.capacity, max(self.after)) if self.after else self.capacity

    @functools.cached_property
    def step_mask(self) -> torch.Tensor | None:
        """The columns that the query of a step sees, bool `[batch_size, 1, 1, columns]`.

        None where it sees all of them.
        """
        if self.after and min(self.after) == max(self.after) == self.step_columns <= self.window:
            return None
        return self._ring(self.queries, self.step_columns, self.queries)[:, None]

    def _ring(self, last: torch.Tensor, columns: int, queries: torch.Tensor) -> torch.Tensor:
        """Returns which columns of a ring queries see, bool `[batch_size, q_len, columns]`.

        Args:
            last: int64 `[batch_size, 1]`, positions of the last tokens in the rings.
            columns: Number of columns to read.
            queries: int64 `[batch_size, q_len]`, positions of the queries, none before the last
                token.
        """
        slots = torch.arange(columns, device=last.device)
        tokens = last - (last - slots) % self.capacity
        tokens = torch.where(tokens >= 0, tokens, NEVER)[:, None]
        return (tokens >= 0) & (tokens > queries[..., None] - self.window)

    @functools.cached_property
    def parts(self) -> list[WindowPart]:
        """The queries of a chunk, which reads the rings before its tokens are stored."""
        queries, device, before = self.queries, self.queries.device, self.before
        keys = queries if self.keys is None else self.keys
        # Without padding one mask is that of all sequences. A single column that is not a step has
        # padding, whose position differs from that of a token.
        if self.keys is queries and len(set(before)) == 1:
            queries, keys, before = queries[:1], keys[:1], before[:1]
        length, window, out = queries.shape[1], self.window, []
        # The ring has the capacity of the call before, which is this one's unless it was not full.
        last = torch.tensor(before).to(device, non_blocking=True)[:, None] - 1
        # Between two tokens of a sequence are as many columns as tokens, unless padding is inside.
        begins = [span.start if isinstance(span, slice) else length for span in self.spans]
        reach = window + max(begins)  # queries from this column on see nothing of the ring
        holes = max(begins) == length
        for first in range(0, length, MAX_QUERIES):
            stop = min(first + MAX_QUERIES, length)
            start = 0 if holes else max(0, first - window + 1)
            held = self.held if first < reach else 0
            part, own = queries[:, first:stop], keys[:, None, start:stop]
            seen = (own <= part[..., None]) & (own > part[..., None] - window) & (own >= 0)
            if held:
                seen = torch.cat((self._ring(last, held, part), seen), 2)
            seen = seen | ~seen.any(-1, keepdim=True)  # padding sees anything, to stay finite
            out.append(WindowPart(slice(first, stop), held, slice(start, stop), seen[:, None]))
        return out


class Windows:
    """What the layers with a sliding window share in a cache.

    Args:
        window: Number of tokens that a query sees, itself included.

    Attributes:
        capacity: Columns of each ring; 0 before the first call.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.capacity = 0
        self._peaks: list[int] = []  # tokens of each sequence before it was last cropped

    def plan(
        self,
        spans: list[Span],
        before: list[int],
        after: list[int],
        queries: torch.Tensor,
        keys: torch.Tensor | None,
        rope: Table | None,
        *,
        past: bool,
        simulated: bool,
    ) -> WindowPlan:
        """Plans a call.

        Args:
            spans: Columns of each sequence that are tokens.
            before: Tokens of each sequence before the call.
            after: Tokens of each sequence after the call.
            queries: int64 `[batch_size, new_len]`, positions of the new queries.
            keys: Positions of the new keys; see :attr:`WindowPlan.keys`.
            rope: See :class:`WindowPlan`.
            past: Whether there were columns before the call.
            simulated: See :class:`WindowPlan`.
        """
        held = min(self.capacity, max(before))
        self.capacity = ring_capacity(self.window, self.capacity, max(after))
        new_len = queries.shape[1]
        return WindowPlan(
            window=self.window,
            capacity=self.capacity,
            held=held,
            spans=spans,
            before=before,
            after=after,
            queries=queries,
            keys=keys,
            first=not past and all(isinstance(span, slice) for span in spans),
            step=new_len == 1 and all(a - b == 1 for a, b in zip(after, before, strict=True)),
            simulated=simulated,
            rope=rope,
        )

    def graph_plan(self, positions: torch.Tensor) -> WindowPlan:
        """Makes the plan of a step for a CUDA graph, which is independent of host lengths.

        Args:
            positions: int64 `[batch_size, 1]`, which the graph advances.
        """
        spans: list[Span] = [slice(0, 1)] * len(positions)
        return WindowPlan(
            window=self.window,
            capacity=self.capacity,
            held=self.capacity,
            spans=spans,
            before=[],
            after=[],
            queries=positions,
            keys=None,
            first=False,
            step=True,
            simulated=False,
            rope=None,
        )

    def reserve(self) -> None:
        """Makes the rings as large as they can become, so that no later step replaces them."""
        self.capacity = self.window + ROLLBACK

    def check_crop(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Refuses a cut behind which a query would see tokens that the rings no longer hold.

        Args:
            before: Tokens of each sequence.
            after: Tokens that are to be left.

        Raises:
            UserError: A sequence would lose too many tokens.
        """
        peaks = self._peaks or [0] * len(before)
        room = self.window + ROLLBACK - 1  # a step that is undone may have written one column
        for number, (length, left, peak) in enumerate(zip(before, after, peaks, strict=True)):
            lost = max(length, peak) - room
            if left < length and max(0, left - self.window + 1) < min(left, lost):
                raise UserError(
                    f"crop: sequence {number} has {length} tokens and would keep {left}, but its "
                    f"sliding-window layers (sliding_window: {self.window}) hold the last "
                    f"{room} alone, so that at most {ROLLBACK} can be taken back; crop less, or "
                    "prefill the shorter prompt anew"
                )

    def crop(self, before: Sequence[int]) -> None:
        """Notes the tokens of each sequence before it is cropped."""
        peaks = self._peaks or [0] * len(before)
        self._peaks = [max(pair) for pair in zip(before, peaks, strict=True)]

    def select(self, order: list[int]) -> None:
        """Keeps or repeats the given sequences."""
        if self._peaks:
            self._peaks = [self._peaks[i] for i in order]

    def take_over(self, others: Sequence[Windows], sizes: Sequence[int]) -> None:
        """Appends the sequences of other caches.

        Args:
            others: Their windows, as long as these.
            sizes: Number of sequences of this cache and of each other one.
        """
        every = [self, *others]
        if any(windows._peaks for windows in every):
            parts = zip(every, sizes, strict=True)
            self._peaks = [peak for w, n in parts for peak in (w._peaks or [0] * n)]
        self.capacity = max(windows.capacity for windows in every)

    def empty(self) -> Windows:
        """Returns the windows of an empty cache."""
        return Windows(self.window)

    def fork(self) -> Windows:
        """Returns an independent copy."""
        other = Windows(self.window)
        other.capacity, other._peaks = self.capacity, list(self._peaks)
        return other
