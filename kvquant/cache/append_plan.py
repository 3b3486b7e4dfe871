"""The plan of where one call's tokens go, which all layers follow.

Prompts of different lengths, padded on either side, have their first tokens, their blocks and their
unfinished blocks at different columns. Tables of these columns are made once per call, so that each
layer stores all sequences with a few operations instead of some for each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Span = slice | torch.Tensor


@dataclass(frozen=True)
class View:
    """A state of the layout: token, tail and block counts of each sequence."""

    lengths: list[int]
    tails: list[int]
    blocks: list[int]


@dataclass(frozen=True)
class AppendPlan:
    """The plan of where every layer stores the tokens of one call.

    Attributes:
        spans: Columns of each sequence that are tokens.
        before: State before the call.
        after: State after the call.
        arena: Number of the arena for the new blocks; -1 if there are none.
        at: Place of the first new block in the arena; the others follow, sequence by sequence.
        capacity: Number of blocks of that arena if it has to be made, else 0.
        decode: Whether every sequence gets exactly one token and has filled its sinks.
    """

    spans: list[Span]
    before: View
    after: View
    arena: int
    at: int
    capacity: int
    decode: bool
    _whole: dict[torch.device, WholeCall | None] = field(default_factory=dict, compare=False)

    def new_blocks(self, sequence: int) -> int:
        """Returns the number of blocks that become full in a sequence."""
        return self.after.blocks[sequence] - self.before.blocks[sequence]

    def whole_call(self, device: torch.device, sinks: int, size: int) -> WholeCall | None:
        """Returns where all sequences' tokens go, or None where each is stored on its own.

        The tables are made for the first layer on a device; see :meth:`WholeCall.make`.
        """
        if device not in self._whole:
            self._whole[device] = WholeCall.make(self, sinks, size, device)
        return self._whole[device]

    def whole(self, columns: int) -> bool:
        """Returns whether all of the call's columns are tokens in every sequence."""
        every = slice(0, columns)
        return all(isinstance(span, slice) and span == every for span in self.spans)


@dataclass(frozen=True)
class WholeCall:
    """The columns of a call's tokens by where they go.

    Attributes:
        sinks: int64 `[batch_size, sinks]`, the columns of the first tokens; None: none are stored.
        places: int32 `[blocks, 2]`, the sequence and the first column of each new block; None: no
            block becomes full.
        tail: int64 `[batch_size, longest tail]`, the columns of the unfinished blocks. Behind the
            end of a sequence its last token is repeated. None: all sequences end with a block.
    """

    sinks: torch.Tensor | None
    places: torch.Tensor | None
    tail: torch.Tensor | None

    @classmethod
    def make(
        cls, plan: AppendPlan, sinks: int, size: int, device: torch.device
    ) -> WholeCall | None:
        """Makes the tables of a call, or returns None where sequences have to be taken singly.

        Args:
            plan: The plan of the call.
            sinks: First tokens of a sequence that stay in 16 bits.
            size: Tokens per block.
            device: Where the tables are needed.
        """
        before, spans = plan.before, [s for s in plan.spans if isinstance(s, slice)]
        counts = [span.stop - span.start for span in spans]
        missing = {max(0, sinks - length) for length in before.lengths}
        if len(spans) < len(plan.spans) or any(before.tails) or len(missing) != 1:
            return None
        taken = missing.pop()
        if min(counts) < max(1, taken):  # a row of padding, or one that lacks first tokens after it
            return None
        first = torch.tensor([span.start for span in spans])
        blocks = torch.tensor([plan.new_blocks(b) for b in range(len(spans))])
        last = torch.tensor([span.stop - 1 for span in spans])[:, None]
        longest, places = max(plan.after.tails), None
        if total := int(blocks.sum()):
            sequences = torch.arange(len(spans)).repeat_interleave(blocks)
            ordinals = torch.arange(total) - (blocks.cumsum(0) - blocks)[sequences]
            columns = first[sequences] + taken + ordinals * size
            places = torch.stack((sequences, columns), 1).int()
        tail = (first + taken + blocks * size)[:, None] + torch.arange(longest)
        tables = (
            first[:, None] + torch.arange(taken) if taken else None,
            places,
            tail.minimum(last) if longest else None,
        )
        return cls(*(t if t is None else t.to(device, non_blocking=True) for t in tables))


def copy_columns(x: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """Copies the tokens at columns of each sequence.

    Args:
        x: `[batch_size, num_heads, seq_len, head_dim]`.
        columns: int64 `[batch_size, n]`.
        out: `[batch_size, num_heads, n, head_dim]`, of the same dtype, any strides.
    """
    torch.gather(x, 2, columns[:, None, :, None].expand(out.shape), out=out)
