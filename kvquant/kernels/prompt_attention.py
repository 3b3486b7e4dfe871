"""Attention of the columns of a prompt in 8 bits, by the fastest way that a device has.

Long prompts spend most of their time in attention. Its two products run in 8 bits here; softmax and
sums stay in fp32. Calls with few new columns, decode steps among them, gain nothing and do not come
here (:data:`MIN_COLUMNS`).
"""

from __future__ import annotations

import torch

from kvquant.kernels.eight_bit_attention import eight_bit_attention
from kvquant.kernels.masked_attention import masked_attention

MIN_COLUMNS = 128  # new columns of a call from which on its attention may run in 8 bits


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
            hides a column, the products are in 16 bits: 8-bit ones have no windows.

    Returns:
        `[batch_size, q_len, num_heads, head_dim]` in the dtype of the queries.
    """
    if window is not None and keys.shape[2] > window:
        seen = _seen(queries.shape[2], keys.shape[2], window, valid, queries.device)
        return masked_attention(queries, keys, values, seen, scaling)
    return eight_bit_attention(queries, keys, values, scaling=scaling, valid=valid)


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
