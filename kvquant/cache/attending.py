"""The base class of caches whose layers compute the attention themselves.

The model's hooks begin and end a forward call (:mod:`kvquant.models.hooks`); its attention modules
pass their queries, keys and values to :meth:`AttendingCache.attend`. One plan per call says what to
do. Each layer gets it as an argument, so that a layer knows its own tensors but not the cache.
"""

from __future__ import annotations

import functools
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kvquant.cache.forward_call import CallRecord
from kvquant.cache.interface import QuantizeClock
from kvquant.cache.kept_rope import Table
from kvquant.cache.window_plan import WindowPlan
from kvquant.errors import UserError
from kvquant.formats.rope import rotate
from kvquant.study.scheme_kinds import PromptAttention

Protocol = Literal["A", "B"]


class FullAttention(typing.Protocol):
    """Attention of rotated queries, keys and values in full, causal and masked."""

    def __call__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        /,
        *,
        valid: torch.Tensor | None = None,
        over_past: bool = False,
    ) -> torch.Tensor:
        """Computes the attention.

        Args:
            queries: `[batch_size, num_heads, q_len, head_dim]`.
            keys: `[batch_size, num_kv_heads, kv_len, head_dim]`; the last are those of the queries.
            values: The same shape.
            valid: bool `[batch_size, kv_len]`, which columns are tokens, for calls over a past.
            over_past: Whether the keys are not those of the call alone, whose mask is then unused.

        Returns:
            `[batch_size, q_len, num_heads, head_dim]`.
        """


@dataclass(frozen=True)
class CallPlan(ABC):
    """The part of a forward call's plan that every cache has.

    Attributes:
        query_positions: int64 `[batch_size, new_len]`, the index of each new column in its
            sequence.
        rope: Rotary table of the new columns, `[batch_size, new_len, head_dim]` each, or None where
            the model's own table is used.
        storing: Must be called before anything is stored; then the call cannot be undone.
        window: What layers with a sliding window do; None if there is no such layer.
    """

    query_positions: torch.Tensor
    rope: Table | None
    storing: Callable[[], None]
    window: WindowPlan | None

    @property
    def device(self) -> torch.device:
        """The device of the plan's tensors, which is that of the layers that follow it."""
        return self.query_positions.device

    @abstractmethod
    def on(self, device: torch.device) -> Self:
        """Returns the plan for the layers of another device, before one of them completes it.

        Each tensor is copied once, from device to device, and the host does not wait.
        """


Plan = TypeVar("Plan", bound=CallPlan)


class NewTokens:
    """The queries, keys and values of a call's new columns in one layer.

    Args:
        queries: Before RoPE, `[batch_size, num_heads, new_len, head_dim]`.
        keys: Before RoPE, `[batch_size, num_kv_heads, new_len, head_dim]`.
        values: The same shape.
        rope: Rotary table, `[1 or batch_size, new_len, head_dim]` each; None in a layer without
            RoPE.
        sink_logits: `[num_heads]`, the learned logits of the layer's attention sinks; None: it has
            none.

    Attributes:
        queries: After RoPE.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rope: Table | None,
        sink_logits: torch.Tensor | None = None,
    ) -> None:
        # Some families have fp32 tables, which would give fp32 queries beside 16-bit values.
        self.queries = queries if rope is None else rotate(queries, *rope).to(queries.dtype)
        self.keys = keys
        self.values = values
        self.sink_logits = sink_logits
        self._rope = rope

    @functools.cached_property
    def rotated_keys(self) -> torch.Tensor:
        """The keys after RoPE, computed on first use because not every path needs them."""
        if self._rope is None:
            return self.keys
        return rotate(self.keys, *self._rope).to(self.keys.dtype)

    @property
    def rotates(self) -> bool:
        """Whether the layer has RoPE, so that stored keys are rotated when they are read."""
        return self._rope is not None


@dataclass
class Extent:
    """The number of columns seen, which the cache counts and its layers read.

    Attributes:
        columns: Columns seen in completed calls, padding included.
    """

    columns: int = 0


class AttendingLayer(CacheLayerMixin, Generic[Plan]):
    """One layer of an :class:`AttendingCache`.

    Args:
        extent: The extent that the cache counts.
        clock: The clock that times quantization.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, extent: Extent, clock: QuantizeClock) -> None:
        super().__init__()
        self._extent = extent
        self.clock = clock

    @abstractmethod
    def attend(
        self, plan: Plan, new: NewTokens, scaling: float, full: FullAttention
    ) -> torch.Tensor:
        """Computes the attention of a call's queries and stores the call's keys and values.

        Args:
            plan: The plan of the call, the same for all layers of a device.
            new: The layer's queries, keys and values.
            scaling: Factor of the scores.
            full: The model's own attention. It is used where there is no past, where the past is
                what this call has just stored, and where the call attends in 8 bits.

        Returns:
            `[batch_size, new_len, num_heads, head_dim]`.
        """

    def table(self, plan: Plan) -> Table | None:
        """Returns the rotary table of a call's new columns, or None where it is the model's."""
        return plan.rope

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing, because a layer allocates memory when its first tokens come."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuses the call: an attention that does not know the cache would misread it."""
        raise RuntimeError(
            "a quantized cache needs the attention of kvquant: load the model through "
            "kvquant.models.loading.load_quantized_model"
        )

    def get_seq_length(self) -> int:
        """Returns the columns seen so far, padding included, as transformers counts them."""
        return self._extent.columns

    def get_max_length(self) -> int:
        """Returns -1, which says that there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Returns -1, as :meth:`get_max_length` does; older transformers use this name."""
        return -1

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Returns key length and offset of the attention mask for `query_length` new columns."""
        if isinstance(query_length, torch.Tensor):
            query_length = query_length.shape[0]
        return self._extent.columns + query_length, 0


class AttendingCache(Cache, ABC, Generic[Plan]):
    """A cache whose layers compute the attention themselves, from keys before RoPE.

    Other caches get keys after RoPE from the model's own attention, as in plain transformers.

    Args:
        layers: The layers, which share `extent` and `clock`.
        protocol: "A": the tokens of a call attend to each other in full precision and to the past
            from the cache (serving). "B": everything is read from the cache (KVQuant's perplexity).
        extent: The extent that the cache counts.
        clock: The clock that times quantization.

    Attributes:
        calls: The current call, its plan, and whether an earlier call ended early.
    """

    # The inputs of a forward call of the whole model, until its decoder begins. A decoder that
    # finds its own inputs here is part of that call, which then ends it.
    outer: torch.Tensor | None = None
    within: bool = False  # whether the current call is part of one of the whole model
    # Rotary embedding of the cache's model, which rotates stored keys; None: unknown
    rotary: nn.Module | None = None
    unrotated: frozenset[int] = frozenset()  # layers without RoPE
    position_limit: int | None = None  # the model's, found by the first call
    # The shortest window that the layers do not know, which no call may exceed
    window: int | None = None
    soft_cap: float | None = None  # bound of the scores of all layers
    # In how many bits calls with many new columns attend; the model's hooks see to it.
    prompt_attention: PromptAttention = "16-bit"

    def __init__(
        self,
        layers: Sequence[AttendingLayer[Plan]],
        protocol: Protocol,
        extent: Extent,
        clock: QuantizeClock,
    ) -> None:
        if protocol not in ("A", "B"):
            raise ValueError(f"protocol: must be 'A' or 'B', got {protocol!r}")
        super().__init__(layers=list(layers))
        self.protocol = protocol
        self.extent = extent
        self.clock = clock
        self.calls: CallRecord[Plan] = CallRecord()

    @abstractmethod
    def begin_forward(
        self,
        batch: int,
        new_len: int,
        mask: torch.Tensor | None,
        device: torch.device,
        positions: torch.Tensor | None = None,
        *,
        given: bool = True,
        held: bool = False,
    ) -> Plan:
        """Begins a forward call, whose tokens and padding are now known, and makes its plan.

        Args:
            batch: Number of sequences.
            new_len: Number of new columns.
            mask: `[batch_size, columns]` with 1 = token, 0 = padding, or None for no padding.
            device: Device of the model's inputs. Layers may be on others.
            positions: int64 `[1 or batch_size, new_len]`, the positions by which new columns are
                rotated. None: the index of each token in its sequence.
            given: Whether the caller of the model gave the positions; else they are its default.
            held: Whether the call ends with :meth:`end_forward`; else it ends with its last layer.
        """

    @abstractmethod
    def meet(
        self,
        plan: Plan,
        layer: AttendingLayer[Plan],
        queries: torch.Tensor,
        keys: torch.Tensor,
        rope: Table,
    ) -> Plan:
        """Completes the plan of the current call with what the first layer of a device brings.

        Layers with a sliding window, which may have another rotary table, complete no plan.

        Args:
            plan: The plan that :meth:`begin_forward` made, on the layer's device.
            layer: The layer.
            queries: Before RoPE, `[batch_size, num_heads, new_len, head_dim]`.
            keys: Before RoPE, `[batch_size, num_kv_heads, new_len, head_dim]`.
            rope: The model's rotary table, `[1 or batch_size, new_len, head_dim]` each.
        """

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rope: Table,
        scaling: float,
        full: FullAttention,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the attention of one layer in the current call and stores its new tokens.

        Args:
            layer: Index of the layer.
            queries: Before RoPE, `[batch_size, num_heads, new_len, head_dim]`.
            keys: New keys before RoPE, `[batch_size, num_kv_heads, new_len, head_dim]`.
            values: New values, the same shape.
            rope: The model's rotary table, `[1 or batch_size, new_len, head_dim]` each.
            scaling: Factor of the scores.
            full: See :meth:`AttendingLayer.attend`.
            sink_logits: See :class:`NewTokens`.

        Returns:
            `[batch_size, new_len, num_heads, head_dim]`.

        Raises:
            UserError: No call was begun for the layer, so that there is no plan.
        """
        plan, met = self.calls.enter(layer, keys.shape[2], keys.device)
        own: AttendingLayer[Plan] = self.layers[layer]
        if not met and not own.is_sliding:
            plan = self.meet(plan, own, queries, keys, rope)
            self.calls.meet(plan)
        table = None if layer in self.unrotated else own.table(plan) or rope
        new = NewTokens(queries, keys, values, table, sink_logits)
        out = own.attend(plan, new, scaling, full)
        if self.calls.leave(layer):
            self.end_forward()
        return out

    def end_forward(self) -> None:
        """Ends the current call, if there is one, and counts its columns.

        Raises:
            UserError: A layer did not take part in the call.
        """
        plan = self.calls.end()
        if plan is not None:
            self.extent.columns += plan.query_positions.shape[1]
            self.ended(plan)
            self.calls.close()

    def ended(self, plan: Plan) -> None:
        """Keeps what a completed call's plan says about later calls; does nothing by default."""

    @property
    def columns(self) -> int:
        """The columns seen so far in completed calls, padding included."""
        return self.extent.columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the columns seen so far in completed calls, padding included."""
        return self.extent.columns

    @property
    def timed(self) -> bool:
        """Whether quantization is synchronized, so that its time is right on a GPU."""
        return self.clock.timed

    @timed.setter
    def timed(self, timed: bool) -> None:
        self.clock.timed = timed

    @property
    def quantize_seconds(self) -> float:
        """Seconds spent on quantizing and packing since creation."""
        return self.clock.quantize_seconds

    def __reduce__(self) -> Any:
        """Refuses to pickle the cache, because a pickle would include the model.

        Raises:
            UserError: Always.
        """
        raise UserError("cache: cannot be pickled or saved; take a copy() to reuse a prompt")
