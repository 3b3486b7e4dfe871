"""Attention of the columns of a prompt in 8 bits, by the fastest backend that a device has.

Long prompts spend most of their time in attention. Its two products run in 8 bits here; softmax and
sums stay in fp32. Calls with few new columns, decode steps among them, gain nothing and do not come
here (:data:`kvquant.study.scheme_kinds.MIN_COLUMNS`).
"""

from __future__ import annotations

import torch

from kvquant.kernels.eight_bit_attention import eight_bit_attention
from kvquant.kernels.masked_attention import masked_attention
from kvquant.kernels.prompt_backend import select_prompt
from kvquant.study.scheme_kinds import MIN_COLUMNS as MIN_COLUMNS


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    valid: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Computes causal attention whose products run in 8 bits.

    The queries are those of the last `q_len` columns: the one at index `i` sees the keys up to
    column `kv_len - q_len + i`.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]`, after RoPE.
        keys: `[batch_size, num_kv_heads, kv_len, head_dim]`, after RoPE; `num_heads` is a multiple
            of `num_kv_heads`.
        values: The same shape.
        scaling: Factor of the scores.
        valid: bool `[batch_size, kv_len]`, which columns are tokens; None: all. Padding lies on
            either side of the call's own columns, and anywhere before them.
        window: Number of columns that a query sees at most, its own included; None: all. Where it
            hides a column, the products are in 16 bits in PyTorch and beside padding.

    Returns:
        `[batch_size, q_len, num_heads, head_dim]` in the dtype of the queries.
    """
    q_len, kv_len, dim = queries.shape[2], *keys.shape[2:]
    if window is not None and kv_len <= window:
        window = None
    backend = select_prompt(dim, queries.dtype, queries.device).backend
    if window is not None and (valid is not None or backend == "pytorch"):
        seen = _seen(q_len, kv_len, window, valid, queries.device)
        if valid is not None:  # a weight of 0 does not hide what is not finite
            keys, values = (x.masked_fill(~valid[:, None, :, None], 0) for x in (keys, values))
        return masked_attention(queries, keys, values, seen, scaling)
    if backend == "pytorch":
        return eight_bit_attention(queries, keys, values, scaling=scaling, valid=valid)
    from kvquant.kernels.prompt_parts import PromptParts, token_columns  # needs Triton

    assert backend is not None
    if valid is None:
        parts = PromptParts(queries, keys.shape[1], scaling, 1, backend)
        parts.add(keys, values, window=window)
        return parts.result()
    own = valid[:, kv_len - q_len :]
    parts = PromptParts(queries, keys.shape[1], scaling, 1, backend, columns=token_columns(own))
    tokens, asked = valid.sum(1), own.sum(1)
    counts = torch.stack((asked, tokens, tokens - asked), 1).int()
    parts.add(keys, values, counts, columns=token_columns(valid))
    return parts.result()


def _seen(
    q_len: int, kv_len: int, window: int, valid: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Returns bool `[1 or batch_size, 1, q_len, kv_len]`: whether a query sees a key.

    Queries of padding, which would see nothing, see themselves.
    """
    columns = torch.arange(kv_len, device=device)
    back = columns[kv_len - q_len :, None] - columns
    seen = ((back >= 0) & (back < window))[None, None]
    return seen if valid is None else (seen & valid[:, None, None]) | (back == 0)
