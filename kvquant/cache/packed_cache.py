"""The state of a cache of packed blocks, and what changes its sequences as a whole.

Forward calls are added by :class:`kvquant.cache.kvquant_cache.KVQuantCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch

from kvquant.cache.attending import AttendingCache, AttendingLayer, Extent, Protocol
from kvquant.cache.block_layer import BlockLayer
from kvquant.cache.block_store import BlockStore
from kvquant.cache.call_rope import CallRope
from kvquant.cache.codec import Codec
from kvquant.cache.forward_call import CallRecord
from kvquant.cache.forward_plan import ForwardPlan
from kvquant.cache.interface import QuantizeClock, sequence_indices
from kvquant.cache.late_check import LateCheck
from kvquant.cache.layout import Layout
from kvquant.cache.outlier_watch import OutlierWatch
from kvquant.cache.padding import Padding
from kvquant.cache.planner import Planner
from kvquant.cache.window_layer import WindowLayer
from kvquant.cache.window_plan import Windows
from kvquant.formats.rope import Rope

# The layout of a cache whose layers all have windows: lengths alone, as nothing is packed.
NOTHING_PACKED = (0, 1 << 30, 0)


class PackedCache(AttendingCache[ForwardPlan]):
    """A cache whose layers hold packed blocks, or the last tokens where they have a window.

    Args:
        codecs: One codec per layer; None for a layer with a sliding window.
        rope: Maps positions `[1, n]` to the rotary table `(cos, sin)`, each `[1, n, head_dim]`, of
            the layers with codecs.
        protocol: See :class:`AttendingCache`.
        static_rope: Whether a position's rotation does not depend on the length of the sequence, as
            decode kernels need.
        keep_rope: Whether to keep the rotation of each token, because that of a position changes
            from call to call (dynamic scaling).
        window: Number of tokens that a query sees in a layer with a sliding window, itself
            included; None if there is no such layer.
        window_rope: The rotary table of these layers; None: `rope`.
        soft_cap: Bound of the scores of all layers, by which the hyperbolic tangent squeezes them
            (Gemma 2); None: there is none.

    Attributes:
        layout: The places of all tokens, shared by all layers.
        graphs: Whether the model may run its decode steps as a CUDA graph.
        steps: What :mod:`kvquant.models.graph_calls` knows of the steps so far; None before.
        changes: Number of times that sequences were chosen, cut or joined.
    """

    graphs: bool = True
    steps: Any = None
    changes: int = 0

    def __init__(
        self,
        codecs: Sequence[Codec | None],
        rope: Rope,
        protocol: Protocol = "A",
        *,
        static_rope: bool = False,
        keep_rope: bool = False,
        window: int | None = None,
        window_rope: Rope | None = None,
        soft_cap: float | None = None,
    ) -> None:
        packing = [codec for codec in codecs if codec is not None]
        if (window is None) != (len(packing) == len(codecs)):
            raise ValueError("window: needed where a layer has no codec, and only there")
        shapes = {(c.sinks, c.block_size, c.residual) for c in packing} or {NOTHING_PACKED}
        if len(shapes) != 1:
            raise ValueError("codecs: all layers need the same sinks, block_size and residual")
        extent, clock = Extent(), QuantizeClock()
        self._windows = None if window is None else Windows(window)
        layers: list[AttendingLayer[ForwardPlan]] = [
            WindowLayer(window or 0, soft_cap, extent, clock)
            if codec is None
            else BlockLayer(codec, extent, clock, soft_cap)
            for codec in codecs
        ]
        super().__init__(layers, protocol, extent, clock)
        self.soft_cap = soft_cap
        self.packed = [layer for layer in layers if isinstance(layer, BlockLayer)]
        self.sliding = [layer for layer in layers if isinstance(layer, WindowLayer)]
        self.layout = Layout(*shapes.pop())
        self.static_rope = static_rope
        self._before = self.layout.view()  # the state before the current call
        local = None if window is None else window_rope or rope
        rotated = bool(packing) and packing[0].rotated_keys
        self._rope = CallRope(rope, keep=keep_rope, rotated=rotated, local=local)
        self._padding = Padding()
        self._watch, self._late = self._new_watch(), LateCheck()
        self._planner = self._new_planner()

    def _new_watch(self) -> OutlierWatch:
        return OutlierWatch(self.packed[0].codec.share if self.packed else None)

    def _new_planner(self, query_heads: int = 0) -> Planner:
        return Planner(
            self.layout,
            self._rope,
            self.packed[0].store if self.packed else None,
            simulated=self.protocol == "B",
            static_rope=self.static_rope,
            narrow_tables=all(layer.codec.narrow_tables for layer in self.packed),
            storing=self.calls.store,
            query_heads=query_heads,
            windows=self._windows,
            soft_cap=self.soft_cap,
        )

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence in completed calls."""
        return list(self._before.lengths if self.calls.running else self.layout.lengths)

    @property
    def batch_size(self) -> int:
        """The number of sequences; -1 before the first call."""
        return len(self._before.lengths if self.calls.running else self.layout.table) or -1

    @property
    def kept_nbytes(self) -> int:
        """The bytes of rotary tables that are kept per token (:class:`KeptRope`)."""
        return 0 if self._rope.kept is None else self._rope.kept.nbytes

    def reset(self) -> None:
        """Empties the cache, which can then be used anew."""
        self.layout = self.layout.empty()
        self._padding, self._watch, self._late = Padding(), self._new_watch(), LateCheck()
        self._rope = self._rope.empty()
        self.extent.columns = 0
        self.steps, self.changes = None, self.changes + 1
        for layer in self.packed:
            layer.store = BlockStore(layer.codec)
        self._windows = None if self._windows is None else self._windows.empty()
        for window in self.sliding:
            window.ring = None
        self.calls = CallRecord()
        self._planner = self._new_planner()

    def _select(self, indices: torch.Tensor) -> None:
        if not self.layout.table:
            return
        self.changes += 1
        order, before = indices.tolist(), len(self.layout.table)
        with self.calls.changing("choosing or cutting its sequences"):
            self.layout.select(order)
            self._planner.forget_blocks()
            self._padding.select(indices)
            self._rope.select(indices, order)
            for layer in self.packed:
                layer.store.select(indices)
            if self._windows is not None:
                self._windows.select(order)
            for window in self.sliding:
                window.select(indices)
            if len(set(order)) < before:
                self._reclaim()

    def _reclaim(self) -> None:
        """Frees the memory of blocks that no sequence uses any more."""
        change = self.layout.reclaim()
        if change is not None:
            for layer in self.packed:
                layer.store.reclaim(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences for beam search; needs one index in range per sequence.

        Packed blocks are shared, not moved.
        """
        self.calls.check()
        self._select(sequence_indices("beam_idx", beam_idx, self.batch_size, whole=True))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given sequences, whose indices :func:`sequence_indices` checks."""
        self.calls.check()
        self._select(sequence_indices("indices", indices, self.batch_size))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence; the copies share its blocks.

        Raises:
            ValueError: `repeats` is less than 1.
        """
        if repeats < 1:
            raise ValueError(f"repeats: must be at least 1, got {repeats}")
        self.calls.check()
        self._select(torch.arange(len(self.layout.table)).repeat_interleave(repeats))

    def take_over(self, others: Sequence[Self]) -> None:
        """Appends the sequences of other caches of the same codecs, which become empty.

        :func:`kvquant.cache.joining.join_caches` checks the caches first.
        """
        sizes = [cache.batch_size for cache in (self, *others)]
        self.changes += 1
        with self.calls.changing("joining other caches"):
            offsets = self.layout.take_over([cache.layout for cache in others])
            paddings = [(c._padding, n, c.columns) for c, n in zip(others, sizes[1:], strict=True)]
            padded = len({cache.columns for cache in (self, *others)}) > 1
            self.extent.columns = self._padding.take_over(paddings, sizes[0], self.columns)
            self._rope.take_over([cache._rope for cache in others], sizes, padded=padded)
            for number, layer in enumerate(self.packed):
                layer.store.take_over([c.packed[number].store for c in others], offsets)
            self._join_windows(others, sizes)
            self._planner.forget_blocks()
            self._before = self.layout.view()
        for cache in others:
            cache.reset()

    def _join_windows(self, others: Sequence[Self], sizes: list[int]) -> None:
        """Appends the windows of other caches; see :meth:`take_over`."""
        if self._windows is None:
            return
        self._windows.take_over([c._windows for c in others if c._windows is not None], sizes)
        for number, layer in enumerate(self.sliding):
            layer.take_over([c.sliding[number] for c in others], self._windows.capacity)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops columns from the end.

        Tokens in 16 bits are cropped exactly. Where the cut falls into a packed block, its kept
        tokens return to the 16-bit tail with their quantized values. Layers with a sliding window
        have forgotten older tokens: once the window is full, at most
        :data:`~kvquant.cache.window_plan.ROLLBACK` tokens can be dropped.

        Args:
            tokens_to_remove: Negative or 0: minus the number of columns to drop, as in the newest
                transformers. Positive: the number of columns to keep, as in older releases.

        Raises:
            UserError: Tokens that a sliding window no longer holds would be needed. Nothing is
                dropped.
        """
        self.calls.check()
        columns, tokens_to_remove = self.columns, int(tokens_to_remove)  # a tensor in 5.17
        keep = columns + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if keep >= columns:
            return
        if keep <= 0:
            self.reset()
            return
        lengths = self._padding.fork().crop(keep) or [keep] * len(self.layout.table)
        if self._windows is not None:
            self._windows.check_crop(self.layout.lengths, lengths)
        self.changes += 1
        with self.calls.changing("choosing or cutting its sequences"):
            if self._windows is not None:
                self._windows.crop(self.layout.lengths)
            self._padding.crop(keep)
            cuts = self.layout.crop(lengths)
            self._planner.forget_blocks()
            for layer in self.packed:
                layer.store.uncut(cuts)
            self._reclaim()
            self.extent.columns = keep

    def copy(self) -> Self:
        """Returns an independent copy that shares packed blocks, to reuse a prompt."""
        self.calls.check()
        rope = self._rope.fork()
        codecs = [getattr(layer, "codec", None) for layer in self.layers]
        other = type(self)(
            codecs,
            rope.counted,
            self.protocol,
            static_rope=self.static_rope,
            window=None if self._windows is None else self._windows.window,
            window_rope=rope.local,
            soft_cap=self.soft_cap,
        )
        other._rope, other.layout = rope, self.layout.fork()
        other._padding, other._watch = self._padding.fork(), self._watch.fork()
        other.extent.columns, other.rotary = self.columns, self.rotary
        other.unrotated, other.prompt_attention = self.unrotated, self.prompt_attention
        for mine, theirs in zip(self.packed, other.packed, strict=True):
            theirs.store = mine.store.fork()
        other._windows = None if self._windows is None else self._windows.fork()
        for held, copied in zip(self.sliding, other.sliding, strict=True):
            copied.ring = held.fork()
        other._planner = other._new_planner(self._planner.query_heads)
        return other

    def __copy__(self) -> Self:
        """Returns :meth:`copy`, as two caches cannot share layers."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns :meth:`copy`, which shares packed blocks."""
        return self.copy()
