"""The unquantized 16-bit cache that every scheme is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


class _HalfPrecision(DynamicLayer):
    """A part of a layer that rounds the tokens of an fp32 model to fp16."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens and returns all keys and values `[batch_size, heads, seq, head_dim]`."""
        kind = key_states.dtype
        if kind is not torch.float32:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = super().update(key_states.half(), value_states.half(), *args, **kwargs)
        return keys.to(kind), values.to(kind)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the given sequences; the indices may be on the device of another layer."""
        if self.is_initialized:
            super().batch_select_indices(indices.to(self.device))


class Fp16Layer(_HalfPrecision):
    """A layer of the unquantized baseline: transformers' growing layer, always in 16 bits.

    With a 16-bit model it acts as `DynamicLayer`. With an fp32 model (CPU) it rounds its tokens to
    fp16, so that the baseline's bits and accuracy are those of a 16-bit cache.
    """


class Fp16WindowLayer(_HalfPrecision, DynamicSlidingWindowLayer):
    """A layer of the unquantized baseline that keeps the tokens of a sliding window."""


def new_baseline_cache(windows: Sequence[int | None] = ()) -> Cache:
    """Makes an unquantized 16-bit cache that grows as transformers' `DynamicCache` does.

    Args:
        windows: The sliding window of each layer, None for one that sees all tokens; may be empty
            where all do.
    """
    if not any(windows):
        return Cache(layer_class_to_replicate=Fp16Layer)
    return Cache(
        layers=[Fp16Layer() if window is None else Fp16WindowLayer(window) for window in windows]
    )
