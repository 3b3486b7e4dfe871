"""What the attention of a tiny model gets."""

from __future__ import annotations

from typing import Any

import torch


def attended(model: Any, windows: list[list[int]], skip: int) -> list[list[torch.Tensor]]:
    """Queries and keys after RoPE of each layer, `[heads, tokens, dim]`, seen where they meet."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((query[0, :, skip:].clone(), key[0, :, skip:].clone()))
        return plain(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["watched"] = watched
    model.config._attn_implementation = "watched"
    with torch.inference_mode():
        for window in windows:
            model(input_ids=torch.tensor([window]), use_cache=False)
    model.config._attn_implementation = "sdpa"
    layers = len(model.model.layers)
    return [[torch.cat([s[i] for s in seen[n::layers]], 1) for i in (0, 1)] for n in range(layers)]
