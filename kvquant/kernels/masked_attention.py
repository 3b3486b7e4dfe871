"""Attention of queries over keys in 16 bits with a mask, in PyTorch, with soft caps and sinks.

Layers with sliding windows use it, whose past is short, and models that cap their scores (Gemma 2)
or have attention sinks (GPT-OSS), which torch's kernels do not have. Gradients pass through it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

# Queries whose scores are in memory at a time where torch's kernels are not used, and their scores.
MAX_QUERIES, MAX_SCORES = 512, 1 << 26


def soft_capped(scores: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """Returns scores squeezed into `(-soft_cap, soft_cap)` by the hyperbolic tangent."""
    return torch.tanh(scores / soft_cap) * soft_cap


def masked_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    soft_cap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes softmax attention with a mask.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]`, rotated.
        keys: `[batch_size, num_kv_heads, n, head_dim]`, rotated; `num_heads` is a multiple of
            `num_kv_heads`.
        values: The same shape.
        mask: `[1 or batch_size, 1, q_len, n]`, bool (whether a query sees a key) or added to the
            scores; None: every query sees every key. A bool row must not be False everywhere.
        scaling: Factor of the scores.
        soft_cap: Bound of the scores before the mask (:func:`soft_capped`); None: there is none.
        sink_logits: `[num_heads]`, a logit of each query head that takes its share of the softmax
            and has no value; None: there is none.

    Returns:
        `[batch_size, q_len, num_heads, head_dim]` in the dtype of the queries.
    """
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    batch, heads, length, dim = queries.shape
    group = heads // keys.shape[1]
    if soft_cap is not None or sink_logits is not None:
        parts = []
        step = max(1, min(MAX_QUERIES, MAX_SCORES // (batch * heads * keys.shape[2])))
        for first in range(0, length, step):
            rows = slice(first, first + step)
            part = None if mask is None else mask[:, :, rows]
            given = queries[:, :, rows], keys, values, part
            parts.append(_explicit(*given, scaling, soft_cap, sink_logits))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    if length == 1:  # the query heads of a group are rows that see the same keys
        packed = queries.reshape(batch, -1, group, dim)
        mask = None if mask is None else mask.expand(-1, -1, group, -1)
        out = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
        return out.reshape(batch, 1, heads, dim)
    keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (keys, values))
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2)


def _explicit(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    soft_cap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Computes attention step by step; see :func:`masked_attention`."""
    batch, heads, length, dim = queries.shape
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    scores = grouped @ keys[:, :, None].mT * scaling
    if soft_cap is not None:
        scores = soft_capped(scores, soft_cap)
    scores = scores.float()
    if mask is not None:
        hidden = mask[:, :, None]
        if mask.dtype is torch.bool:
            scores = scores.masked_fill(~hidden, float("-inf"))
        else:
            scores = scores + hidden
    weights = scores.softmax(-1).to(queries.dtype)
    out = weights @ values[:, :, None]
    if sink_logits is not None:
        # The share of the softmax that the sink leaves for the keys.
        logits = sink_logits.float().view(keys.shape[1], -1, 1)
        share = torch.sigmoid(scores.logsumexp(-1) - logits)
        out = out * share[..., None].to(out.dtype)
    out = out.reshape(batch, heads, length, dim)
    return out.transpose(1, 2)


def causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """Returns bool `[1, 1, length, length]`: whether a query sees a key of the same call."""
    return torch.ones((1, 1, length, length), dtype=torch.bool, device=device).tril()
