"""Attention that leaves the work to an `AttendingCache`; with any other it is the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvquant.cache_interface import AttendingCache

SUPPORTED = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")


@torch.compiler.disable(reason="the cache plans on the host and changes its shapes as it grows")
def _attend(module: Any, cache: Any, *args: Any) -> torch.Tensor:
    """See :meth:`kvquant.block_layer.BlockLayer.attend`.

    In a compiled model the graph ends here and goes on after. The layer is looked up in here, so
    that compiled code serves all layers.
    """
    output: torch.Tensor = cache.layers[module.layer_idx].attend(*args)
    return output


class PrefillQuantizedAttention(nn.Module):
    """Drop-in for the self-attention of Llama, Mistral, Qwen2 and Qwen3.

    Keys are taken before RoPE (after Qwen3's key norm), stored by the cache, and rotated when read,
    so one calibration per channel holds at every position.

    Args:
        original: The attention module to wrap; its weights are shared, not copied.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `[batch_size, new_len, hidden_size]` over the cache and the new tokens."""
        module: Any = self.original
        if not isinstance(past_key_values, AttendingCache):
            return module(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        assert position_embeddings is not None
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        queries = module.q_proj(hidden_states).view(shape)
        keys = module.k_proj(hidden_states).view(shape)
        values = module.v_proj(hidden_states).view(shape).transpose(1, 2)
        if hasattr(module, "q_norm"):
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        implementation = module.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get(implementation, ALL_ATTENTION_FUNCTIONS["sdpa"])

        def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = function(
                module, q, k, v, attention_mask, dropout=0.0, scaling=module.scaling, **kwargs
            )[0]
            return out

        rest = (position_embeddings, module.scaling, full)
        output = _attend(module, past_key_values, queries, keys, values, *rest)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return module.o_proj(output), None
