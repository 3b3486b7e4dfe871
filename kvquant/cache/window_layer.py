"""A layer with a sliding window keeps its last tokens in 16 bits, in a cache of any scheme of ours.

Keys are kept after RoPE, as the model rotates them, because none is read by another position than
its own. What all such layers of a call share is in :mod:`kvquant.cache.window_plan`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvquant.cache.attending import AttendingLayer, Extent, FullAttention, NewTokens, Plan
from kvquant.cache.block_store import stored_dtype
from kvquant.cache.incoming import refuse_changed, refuse_infinite
from kvquant.cache.interface import QuantizeClock
from kvquant.cache.kept_rope import Table
from kvquant.cache.window_plan import WindowPlan
from kvquant.kernels.masked_attention import masked_attention

Ring = tuple[torch.Tensor, torch.Tensor]


class WindowLayer(AttendingLayer[Plan]):
    """A layer whose queries see the last `window` tokens.

    Args:
        window: Number of tokens that a query sees, itself included.
        soft_cap: See :class:`~kvquant.cache.block_layer.BlockLayer`.
        extent: See :class:`AttendingLayer`.
        clock: See :class:`AttendingLayer`.

    Attributes:
        ring: Keys after RoPE and values, `[batch_size, num_kv_heads, capacity, head_dim]` in 16
            bits; None before the first call.
    """

    is_sliding = True
    is_croppable = True

    def __init__(
        self, window: int, soft_cap: float | None, extent: Extent, clock: QuantizeClock
    ) -> None:
        super().__init__(extent, clock)
        self.window = window
        self.soft_cap = soft_cap
        self.ring: Ring | None = None

    def attend(
        self, plan: Plan, new: NewTokens, scaling: float, full: FullAttention
    ) -> torch.Tensor:
        """Computes attention over window and call; see :meth:`AttendingLayer.attend`."""
        windows = plan.window
        assert windows is not None
        keys, values = new.rotated_keys, new.values
        if windows.simulated:
            kind = stored_dtype(keys.dtype)
            keys, values = (x.to(kind).to(x.dtype) for x in (keys, values))
        if windows.first:
            out = full(new.queries, keys, values)
            self._append(plan, windows, keys, values)
        elif windows.step:
            self._append(plan, windows, keys, values)
            assert self.ring is not None
            held_keys, held_values = (x[:, :, : windows.step_columns] for x in self.ring)
            held = held_keys, held_values, windows.step_mask
            out = masked_attention(new.queries, *held, scaling, self.soft_cap, new.sink_logits)
        else:
            out = self._chunk(windows, new, keys, values, scaling)
            self._append(plan, windows, keys, values)
        return out

    def table(self, plan: Plan) -> Table | None:
        """Returns the rotary table of such layers, whose base may be another."""
        return None if plan.window is None else plan.window.rope

    def _chunk(
        self,
        windows: WindowPlan,
        new: NewTokens,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Computes the attention of several columns over ring and call."""
        found = []
        for part in windows.parts:
            k, v = keys[:, :, part.own], values[:, :, part.own]
            if part.held and self.ring is not None:
                held_k, held_v = (x[:, :, : part.held].to(keys.dtype) for x in self.ring)
                k, v = torch.cat((held_k, k), 2), torch.cat((held_v, v), 2)
            given = new.queries[:, :, part.queries], k, v, part.mask
            found.append(masked_attention(*given, scaling, self.soft_cap, new.sink_logits))
        return torch.cat(found, 1) if len(found) > 1 else found[0]

    @torch.inference_mode()  # buffers are inference tensors, whatever mode the caller is in
    def _append(
        self, plan: Plan, windows: WindowPlan, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Stores the last tokens of a call, over those that no query sees any more."""
        plan.storing()
        ring = self._ring(windows.capacity, keys)
        kind = ring[0].dtype
        both = keys.detach().to(kind), values.detach().to(kind)
        if keys.device.type == "cpu":  # on a GPU this check would wait for the device
            refuse_infinite(windows.spans, *both)
        if windows.step:
            index = windows.places.expand(-1, keys.shape[1], 1, keys.shape[3])
            for buffer, x in zip(ring, both, strict=True):
                buffer.scatter_(2, index, x)
            return
        for b, span in enumerate(windows.spans):
            begin, end = windows.before[b], windows.after[b]
            skip = max(0, end - begin - windows.capacity)
            for buffer, x in zip(ring, both, strict=True):
                tokens = x[b, :, span][:, skip:]
                at = (begin + skip) % windows.capacity
                room = windows.capacity - at
                buffer[b, :, at : at + tokens.shape[1]] = tokens[:, :room]
                if tokens.shape[1] > room:
                    buffer[b, :, : tokens.shape[1] - room] = tokens[:, room:]

    def _ring(self, capacity: int, like: torch.Tensor) -> Ring:
        """Returns the ring, made or replaced by a larger one where it has fewer columns.

        Raises:
            UserError: The heads, the device or the dtype differ from those before.
        """
        batch, heads, _, dim = like.shape
        kind = stored_dtype(like.dtype)
        old = self.ring
        if old is not None:
            names = ("sequences", "kv heads", "head_dim", "device", "dtype")
            refuse_changed(names, self._kind(old[0]), (batch, heads, dim, like.device, kind))
            if old[0].shape[2] >= capacity:
                return old
        shape = (batch, heads, capacity, dim)
        new = like.new_zeros(shape, dtype=kind), like.new_zeros(shape, dtype=kind)
        if old is not None:
            for buffer, x in zip(new, old, strict=True):
                buffer[:, :, : x.shape[2]] = x
        self.ring = new
        return new

    @staticmethod
    def _kind(ring: torch.Tensor) -> tuple[int, int, int, torch.device, torch.dtype]:
        return ring.shape[0], ring.shape[1], ring.shape[3], ring.device, ring.dtype

    @torch.inference_mode()
    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` columns, so that no later step replaces the ring."""
        if self.ring is not None:
            self._ring(capacity, self.ring[0])

    @torch.inference_mode()
    def select(self, indices: torch.Tensor) -> None:
        """Keeps or repeats the given sequences."""
        if self.ring is not None:
            where = indices.to(self.ring[0].device)
            self.ring = self.ring[0][where], self.ring[1][where]

    @torch.inference_mode()
    def take_over(self, others: Sequence[WindowLayer[Plan]], capacity: int) -> None:
        """Appends the sequences of the same layer of other caches.

        A ring of fewer columns than `capacity` was never full, so that its tokens keep their
        columns.
        """
        for layer in (self, *others):
            layer.reserve(capacity)
        rings = [layer.ring for layer in (self, *others) if layer.ring is not None]
        keys, values = (torch.cat(parts) for parts in zip(*rings, strict=True))
        self.ring = keys, values

    @torch.inference_mode()
    def fork(self) -> Ring | None:
        """Returns an independent copy of the ring."""
        return None if self.ring is None else (self.ring[0].clone(), self.ring[1].clone())

    @property
    def nbytes(self) -> int:
        """The bytes allocated."""
        return 0 if self.ring is None else sum(x.nbytes for x in self.ring)

    def elements(self, lengths: list[int]) -> int:
        """Returns the number of key and value elements of tokens that a later query sees.

        Args:
            lengths: Tokens of each sequence.
        """
        if self.ring is None:
            return 0
        _, heads, _, dim = self.ring[0].shape
        return 2 * heads * dim * sum(min(n, self.window - 1) for n in lengths)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Returns key length and offset of the mask that the model makes for such layers."""
        if isinstance(query_length, torch.Tensor):
            query_length = query_length.shape[0]
        held = min(self._extent.columns, self.window - 1)
        return held + query_length, self._extent.columns - held

    def offload(self) -> None:
        """Refuses to offload, as packed blocks cannot be offloaded either."""
        raise NotImplementedError("offloading: the cache does not offload its windows")
