"""Plans the calls of a cache: when tokens are stored, and which path reads the past."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kvquant.cache.block_store import BlockStore, stored_dtype
from kvquant.cache.call_rope import CallRope
from kvquant.cache.decode_step import KernelSteps, StepTables
from kvquant.cache.forward_plan import NO_PIECES, FirstCall, ForwardPlan, KernelStep, Order, Path
from kvquant.cache.kept_rope import Table
from kvquant.cache.layout import AppendPlan, Layout
from kvquant.cache.past_reader import PastReader
from kvquant.cache.window_plan import Windows
from kvquant.kernels.backends import Selection, select
from kvquant.kernels.cache_shape import CacheShape


class Planner:
    """Makes the plans of one cache's calls.

    Args:
        layout: Layout of the cache.
        rope: Rotation of the tokens.
        store: Store of the first layer that packs; None if all layers have a sliding window.
        simulated: Whether a call's own tokens are read from the cache, too (protocol B).
        static_rope: Whether a position's rotation does not depend on the length of the sequence.
        narrow_tables: Whether the tables of all layers are narrow (:class:`Codec`).
        storing: See :class:`ForwardPlan`.
        query_heads: Number of query heads of the model; 0 if unknown before the first call.
        windows: What layers with a sliding window share; None if there is no such layer.
        soft_cap: Bound of the scores; None: there is none.
    """

    def __init__(
        self,
        layout: Layout,
        rope: CallRope,
        store: BlockStore | None,
        *,
        simulated: bool,
        static_rope: bool,
        narrow_tables: bool,
        storing: Callable[[], None],
        query_heads: int = 0,
        windows: Windows | None = None,
        soft_cap: float | None = None,
    ) -> None:
        self._layout, self._rope, self._store = layout, rope, store
        self._windows, self._soft_cap = windows, soft_cap
        self._simulated, self._static_rope = simulated, static_rope
        self._narrow_tables = narrow_tables
        self._storing = storing
        self.query_heads = query_heads
        self._known: tuple[object, CacheShape] | None = None  # its inputs, and the shape
        self._reader, self._kernels = PastReader(), KernelSteps()

    def forget_blocks(self) -> None:
        """Drops block numbers and tables after the blocks of sequences have changed."""
        self._reader.forget_blocks()
        self._kernels.forget()

    def begin(
        self,
        append: AppendPlan,
        queries: torch.Tensor,
        keys: torch.Tensor | None,
        *,
        past: bool,
        eight_bits: bool = False,
    ) -> ForwardPlan:
        """Begins the plan of a call with what is known before its first layer.

        Args:
            append: Where the new tokens go.
            queries: int64 `[batch_size, new_len]`, positions of the new queries.
            keys: Positions of the new keys; see :attr:`ForwardPlan.new_positions`.
            past: Whether there were columns before the call. Where all of them are padding, no
                token is read back, but the model's own attention would want keys of them.
            eight_bits: Whether the model's own attention is in 8 bits.
        """
        first = not past and not self._simulated
        window = None
        if self._windows is not None:
            window = self._windows.plan(
                append.spans,
                append.before.lengths,
                append.after.lengths,
                queries,
                keys,
                self._rope.window_table,
                past=past,
                simulated=self._simulated,
            )
        return ForwardPlan(
            query_positions=queries,
            rope=None,
            append=append,
            view=append.after if self._simulated else append.before,
            new_positions=keys,
            first=not past,
            simulated=self._simulated,
            order=Order.APPEND_FIRST if first or self._simulated else Order.READ_FIRST,
            path=FirstCall() if first else NO_PIECES,
            whole=eight_bits and not first,
            storing=self._storing,
            status=None,
            window=window,
        )

    def meet(
        self,
        plan: ForwardPlan,
        store: BlockStore,
        queries: torch.Tensor,
        keys: torch.Tensor,
        rope: Table,
        status: torch.Tensor | None,
    ) -> ForwardPlan:
        """Completes the plan of a call with what the first layer of a device brings.

        Args:
            plan: The plan from :meth:`begin`, on the layer's device.
            store: Store of the layer, which has the same properties as those of the device's
                others.
            queries: Before RoPE, `[batch_size, num_heads, new_len, head_dim]`.
            keys: Before RoPE, `[batch_size, num_kv_heads, new_len, head_dim]`.
            rope: The model's rotary table, `[1 or batch_size, new_len, head_dim]` each.
            status: See :class:`ForwardPlan`.
        """
        self.query_heads = queries.shape[1]
        append, order = plan.append, plan.order
        table = self._rope.table(rope, append.spans, append.before.lengths, queries.dtype)
        path: Path = plan.path
        if path is NO_PIECES:
            step = self._kernel_step(append, store, keys.device)
            if step is not None:
                path, order = step, Order.WITHIN_STEP
            else:
                shape = self._shape(store, keys, queries.dtype)
                path = self._reader.path(plan, self._layout, self._rope, shape, queries, keys)
        return replace(plan, rope=table, order=order, path=path, status=status)

    def _shape(
        self, store: BlockStore, like: torch.Tensor, query_dtype: torch.dtype | None = None
    ) -> CacheShape:
        """Returns the properties of cache and call that decide which backends can run.

        Args:
            store: Store of a layer on the device in question.
            like: New or stored keys, `[batch_size, num_kv_heads, n, head_dim]`.
            query_dtype: Dtype of the call's queries; None where it does not matter.
        """
        _, heads, _, dim = like.shape
        model = (dim, heads, self.query_heads, stored_dtype(like.dtype))
        arenas = self._layout.arenas
        state: dict[str, Any] = {
            "query_dtype": query_dtype,
            "kept_rope": self._rope.kept is not None,
            "packed_by_kernels": store.packed_by_kernels,
            "arenas": len(arenas),
            "arena_blocks": max((arena.capacity for arena in arenas), default=0),
        }
        key = (model, *state.values())
        if self._known is None or self._known[0] != key:  # most steps reuse the last shape
            shape = replace(
                store.codec.cache_shape(*model),
                protocol="B" if self._simulated else "A",
                static_rope=self._static_rope,
                narrow_tables=self._narrow_tables,
                soft_cap=self._soft_cap,
                **state,
            )
            self._known = (key, shape)
        return self._known[1]

    def _stored_shape(self, store: BlockStore | None = None) -> CacheShape | None:
        """Returns the properties of what the cache holds; None before the first call.

        Args:
            store: See :meth:`_shape`; None: that of the first layer that packs.
        """
        store = store or self._store
        if store is None or store.tail is None:
            return None
        return self._shape(store, store.tail[0])

    def select_step(self, device: torch.device) -> Selection | None:
        """Selects the backend of a decode step, with reasons; None before the first call."""
        shape = self._stored_shape()
        return None if shape is None else select("decode", shape, device)

    def step_tables(self, device: torch.device) -> StepTables | None:
        """Returns the decode kernel's tables, or None where another backend takes the steps."""
        return self._step_tables(self._stored_shape(), device)

    def _step_tables(self, shape: CacheShape | None, device: torch.device) -> StepTables | None:
        if shape is None or select("decode", shape, device).backend != "cuda":
            return None
        return self._kernels.tables(shape.decode_shape, self._rope.counted, device)

    def _kernel_step(
        self, append: AppendPlan, store: BlockStore, device: torch.device
    ) -> KernelStep | None:
        """Plans a decode step by the CUDA kernel, or returns None where it cannot take it."""
        if not append.decode:
            return None
        steps = self._step_tables(self._stored_shape(store), device)
        if steps is None:
            return None
        places = steps.take_step(self._layout, append.before)
        return KernelStep(steps.shape, steps.step(), places)

    def graph(
        self, steps: StepTables, positions: torch.Tensor, status: torch.Tensor | None
    ) -> ForwardPlan:
        """Makes the plan of a step for a CUDA graph, which is independent of host lengths.

        Args:
            steps: Tables with room for the steps to come.
            positions: int64 `[batch_size, 1]`, which the graph advances.
            status: See :class:`ForwardPlan`.
        """
        view = self._layout.view()
        spans: list[slice | torch.Tensor] = [slice(0, 1)] * len(view.lengths)
        # The plan packs no block: blocks that become full are packed after the replay.
        append = AppendPlan(spans, view, view, arena=-1, at=0, capacity=0, decode=True)
        return ForwardPlan(
            query_positions=positions,
            rope=None,
            append=append,
            view=view,
            new_positions=None,
            first=False,
            simulated=False,
            order=Order.WITHIN_STEP,
            path=KernelStep(steps.shape, steps.step(whole=True), steps.take_places()),
            whole=False,
            storing=self._storing,
            status=status,
            window=None if self._windows is None else self._windows.graph_plan(positions),
        )
