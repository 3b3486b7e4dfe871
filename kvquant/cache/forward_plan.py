"""The plan of one forward call over a cache of packed blocks: made once, read by all layers.

`KVQuantCache.begin_forward` makes it from the mask and the state of the cache. What only the first
layer can say (number and dtype of the queries, the model's rotary table) is added when that layer
comes (`KVQuantCache.meet`). A plan is never changed; the layers get it as an argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import torch

from kvquant.cache.attending import CallPlan
from kvquant.cache.layout import AppendPlan, View
from kvquant.cache.packed_past import Past
from kvquant.cache.past_pieces import Piece
from kvquant.kernels.cuda_decode import DecodeShape, DecodeStep


class Order(Enum):
    """When a layer stores the call's tokens."""

    APPEND_FIRST = auto()  # before it reads: a first call, and protocol B, which reads them back
    READ_FIRST = auto()  # after it has read the past: protocol A
    WITHIN_STEP = auto()  # as part of the decode step by the kernel


@dataclass(frozen=True)
class FirstCall:
    """There is no past: the model's own attention takes the call's tokens."""


@dataclass(frozen=True)
class KernelStep:
    """The CUDA decode kernel takes one token per sequence and reads all that is stored.

    Attributes:
        shape: What the kernel is compiled for.
        step: Block table, lengths and rotary tables.
        places: int64 `[batch_size]` on the device, where the new token goes in each tail.
    """

    shape: DecodeShape
    step: DecodeStep
    places: torch.Tensor


@dataclass(frozen=True)
class PastPieces:
    """PyTorch reads the past piece by piece.

    Attributes:
        cut: The pieces, cut once per call.
        whole: Whether they are read back at once for the model's own attention: a first call of
            protocol B that is small enough.
    """

    cut: Callable[[], list[Piece]]
    whole: bool


@dataclass(frozen=True)
class PackedPast:
    """The Triton kernels read the packed past.

    Attributes:
        past: What they need.
        pieces: For a layer whose blocks were not packed by kernels, so that none can read them.
    """

    past: Past
    pieces: PastPieces


Path = FirstCall | KernelStep | PackedPast | PastPieces


@dataclass(frozen=True)
class ForwardPlan(CallPlan):
    """What every layer does in one call.

    Attributes:
        append: Columns that are tokens, where they go, and the states before and after.
        view: The state that is read.
        new_positions: `query_positions` as those of keys, `NEVER` for padding; None for a single
            column, whose query sees its own key.
        simulated: Whether the call's own tokens are read from the cache, too (protocol B).
        order: When the tokens are stored.
        path: How the past is read. Until the first layer has come, a past that no decode step
            reads has no pieces.
        storing: To be called before anything is stored: the call cannot be undone from then on.
        status: int32 `[2]` on a GPU, where layers report lost outliers and NaN; None on a CPU, and
            until the first layer has come.
    """

    append: AppendPlan
    view: View
    new_positions: torch.Tensor | None
    simulated: bool
    order: Order
    path: Path
    storing: Callable[[], None]
    status: torch.Tensor | None

    @functools.cached_property
    def token_positions(self) -> torch.Tensor | None:
        """`new_positions`, or None where all of the call's columns are tokens."""
        whole = self.append.whole(self.query_positions.shape[1])
        return None if whole else self.new_positions

    @property
    def first(self) -> bool:
        """Whether no sequence had a token before."""
        return not any(self.append.before.lengths)
