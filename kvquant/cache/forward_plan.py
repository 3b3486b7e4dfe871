"""The plan of one forward call over packed blocks, made once per call and read by all layers.

`KVQuantCache.begin_forward` makes it from the mask and the state of the cache. What only the first
layer knows (number and dtype of the queries, the model's rotary table) is added when that layer
runs (`KVQuantCache.meet`). Plans are immutable, and the layers get theirs as an argument. Where
layers are on several devices, each device has a plan of its own, completed by its first layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Self

import torch

from kvquant.cache.attending import CallPlan
from kvquant.cache.device_copies import DeviceCopies
from kvquant.cache.layout import AppendPlan, View
from kvquant.cache.packed_past import Past
from kvquant.cache.past_pieces import Piece
from kvquant.kernels.backends import Backend
from kvquant.kernels.cuda_decode import DecodeShape, DecodeStep


class Order(Enum):
    """The point at which a layer stores the call's tokens."""

    APPEND_FIRST = auto()  # before it reads: first calls, and protocol B, which reads them back
    READ_FIRST = auto()  # after it has read the past: protocol A
    WITHIN_STEP = auto()  # as part of the decode step by the kernel


@dataclass(frozen=True)
class FirstCall:
    """The path without a past: the model's own attention handles the call's tokens."""


@dataclass(frozen=True)
class KernelStep:
    """The path through the CUDA decode kernel, which takes one token per sequence.

    Attributes:
        shape: The constants that the kernel is compiled for.
        step: Block table, lengths and rotary tables.
        places: int64 `[batch_size]` on the device, where the new token goes in each tail.
    """

    shape: DecodeShape
    step: DecodeStep
    places: torch.Tensor


@dataclass(frozen=True)
class PastPieces:
    """The path through PyTorch, which reads the past piece by piece.

    Attributes:
        cut: Returns the pieces, which are cut once per call.
        whole: Whether all pieces are read back at once for the model's own attention, as in a small
            first call of protocol B, or where that is in 8 bits.
    """

    cut: Callable[[], list[Piece]]
    whole: bool


@dataclass(frozen=True)
class PackedPast:
    """The path through the Triton kernels, which read the packed past.

    Attributes:
        past: The past as the kernels read it.
        pieces: The path for a layer whose blocks were not packed by kernels and which kernels
            therefore cannot read.
        prompt: The backend that attends with 8-bit products; None: products are in 16 bits.
    """

    past: Past
    pieces: PastPieces
    prompt: Backend | None


Path = FirstCall | KernelStep | PackedPast | PastPieces
NO_PIECES = PastPieces(list, whole=False)  # until the first layer of a call has run


@dataclass(frozen=True)
class ForwardPlan(CallPlan):
    """The plan of what every layer does in one call.

    Attributes:
        append: Columns that are tokens, where they go, and the states before and after.
        view: The state of the cache that is read.
        new_positions: Positions of the new keys: `query_positions` with `NEVER` for padding. None
            for a single column, whose query sees its own key.
        first: Whether the cache had no column before the call, not even of padding.
        simulated: Whether the call's own tokens are read from the cache, too (protocol B).
        order: The point at which the tokens are stored.
        path: How the past is read. Until the first layer has run, a past has no pieces.
        whole: Whether all keys and values are read back for the model's own attention, because it
            is in 8 bits.
        status: int32 `[2]` on a GPU, where layers report lost outliers and NaN. None on a CPU and
            until the first layer has run.
    """

    append: AppendPlan
    view: View
    new_positions: torch.Tensor | None
    first: bool
    simulated: bool
    order: Order
    path: Path
    whole: bool
    status: torch.Tensor | None

    def on(self, device: torch.device) -> Self:
        """Returns the plan for the layers of another device; see :meth:`CallPlan.on`."""
        copies = DeviceCopies(device)
        return replace(
            self,
            query_positions=copies.of(self.query_positions),
            rope=copies.of_table(self.rope),
            append=replace(self.append, spans=copies.of_spans(self.append.spans)),
            new_positions=copies.of_any(self.new_positions),
            window=None if self.window is None else self.window.copied(copies),
        )

    @functools.cached_property
    def token_positions(self) -> torch.Tensor | None:
        """`new_positions`, or None where all of the call's columns are tokens."""
        whole = self.append.whole(self.query_positions.shape[1])
        return None if whole else self.new_positions
