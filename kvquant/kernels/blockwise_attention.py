"""Attention over pieces of the past, merged by their log-sum-exp, in PyTorch.

Online softmax over key blocks as in FlashAttention (Dao et al., arXiv 2205.14135). No piece has to
be kept once it was added.
"""

from __future__ import annotations

import math

import torch

from kvquant.kernels.masked_attention import soft_capped

NEVER = -1  # position of a key slot that holds no token


class BlockwiseAttention:
    """Softmax attention of some queries, fed with keys and values piece by piece.

    Args:
        queries: `[batch_size, num_heads, q_len, head_dim]`, rotated.
        positions: int64 `[batch_size, q_len]`; a query sees keys at its position or before.
        num_kv_heads: Key heads; `num_heads` is a multiple of it.
        scaling: Factor of the scores.
        soft_cap: Bound of the scores (:func:`~kvquant.kernels.masked_attention.soft_capped`); None:
            there is none.
        sink_logits: `[num_heads]`, a logit of each query head that takes its share of the softmax
            and has no value; None: there is none.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        positions: torch.Tensor,
        num_kv_heads: int,
        scaling: float,
        soft_cap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> None:
        self._soft_cap = soft_cap
        batch, heads, length, dim = queries.shape
        self._shape = (batch, heads, length, dim)
        self._kind = queries.dtype
        # The query heads of a group share their keys: one product for all of them.
        grouped = (queries.float() * scaling).view(batch, num_kv_heads, -1, length, dim)
        self._group = grouped.shape[2]
        self._queries = grouped.reshape(batch, num_kv_heads, self._group * length, dim)
        self._positions = positions
        rows = self._queries.shape[:3]
        if sink_logits is None:
            self._maximum = queries.new_full(rows, -math.inf, dtype=torch.float32)
            self._sum = queries.new_zeros(rows, dtype=torch.float32)
        else:  # what a row has seen before the first piece
            by_row = sink_logits.float().view(num_kv_heads, -1).repeat_interleave(length, 1)
            self._maximum = by_row.expand(rows)
            self._sum = queries.new_ones(rows, dtype=torch.float32)
        self._output = torch.zeros_like(self._queries)

    def add(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None) -> None:
        """Attends to more keys.

        Args:
            keys: `[batch_size, num_kv_heads, n, head_dim]`, rotated.
            values: The same shape.
            positions: int64 `[batch_size, n]`, `NEVER` where there is no token; None where all
                keys are tokens that every query sees.
        """
        if keys.shape[2] == 0:
            return
        scores = self._queries @ keys.float().transpose(-1, -2)
        if self._soft_cap is not None:
            scores = soft_capped(scores, self._soft_cap)
        if positions is not None:
            seen = positions[:, None] <= self._positions[..., None]
            seen &= (positions >= 0)[:, None]
            hidden = ~seen.repeat(1, self._group, 1)[:, None]
            scores.masked_fill_(hidden, -math.inf)
        maximum = torch.maximum(self._maximum, scores.amax(-1))
        # A row that has seen nothing keeps -inf; a finite stand-in keeps NaN out.
        safe = torch.where(maximum == -math.inf, torch.zeros_like(maximum), maximum)
        weights = scores.sub_(safe[..., None]).exp_()
        old = (self._maximum - safe).exp_()
        self._sum = self._sum * old + weights.sum(-1)
        self._output = self._output.mul_(old[..., None]).add_(weights @ values.float())
        self._maximum = maximum

    def result(self) -> torch.Tensor:
        """Returns `[batch_size, q_len, num_heads, head_dim]` in the dtype of the queries."""
        total = torch.where(self._sum == 0, torch.ones_like(self._sum), self._sum)
        batch, heads, length, dim = self._shape
        out = (self._output / total[..., None]).view(batch, heads, length, dim)
        return out.transpose(1, 2).to(self._kind)
