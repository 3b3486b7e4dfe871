"""The unquantized 16-bit cache that every scheme is compared with."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class Fp16Layer(DynamicLayer):
    """A layer of the unquantized baseline: transformers' growing layer, always in 16 bits.

    With a 16-bit model it acts as `DynamicLayer`. With an fp32 model (CPU) it rounds its tokens to
    fp16, so that the baseline's bits and accuracy are those of a 16-bit cache.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens and returns all keys and values `[batch_size, heads, seq, head_dim]`."""
        kind = key_states.dtype
        if kind is not torch.float32:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = super().update(key_states.half(), value_states.half(), *args, **kwargs)
        return keys.to(kind), values.to(kind)


def new_baseline_cache() -> Cache:
    """Makes an unquantized 16-bit cache that grows as transformers' `DynamicCache` does."""
    return Cache(layer_class_to_replicate=Fp16Layer)
