"""What the layers of a call share to read the past: pieces for PyTorch, tables for kernels.

Both are worked out once per call, when its first layer asks; block numbers outlive a call.
"""

from __future__ import annotations

from typing import Literal

import torch

from kvquant.cache.layout import AppendPlan, Layout, View
from kvquant.cache.packed_past import Past, block_table, range_blocks
from kvquant.cache.past_pieces import Piece, cut_past
from kvquant.formats.rope import Rope
from kvquant.kernels.cuda_decode import DecodeShape
from kvquant.kernels.dispatch import use_triton_attention


class PastReader:
    """The past of a cache, as the current call reads it.

    Args:
        simulated: Whether the call's own tokens are read from the cache, too (protocol B).
    """

    def __init__(self, *, simulated: bool) -> None:
        self._simulated = simulated
        self._layout: Layout
        self._view: View
        # Of the current call; None and False: not asked yet.
        self._pieces: list[Piece] | None = None
        self._past: Past | Literal[False] | None = False
        self._block_table: tuple[list[int], torch.Tensor | None] | None = None

    def begin(self, layout: Layout, plan: AppendPlan) -> None:
        """A call begins; what was for an earlier one is forgotten."""
        self._layout, self._view = layout, plan.after if self._simulated else plan.before
        self._pieces, self._past = None, False

    def forget_blocks(self) -> None:
        """Sequences have other blocks than before."""
        self._block_table = None

    def pieces(self, rope: Rope, queries: torch.Size, device: torch.device) -> list[Piece]:
        """See :func:`kvquant.cache.past_pieces.cut_past`."""
        if self._pieces is None:
            # A step's queries see all that came before; others need their positions compared.
            causal = self._simulated and queries[2] > 1
            self._pieces = cut_past(self._layout, self._view, rope, queries, device, causal=causal)
        return self._pieces

    @property
    def asked(self) -> bool:
        """Whether the current call knows if there is a :attr:`past`."""
        return self._past is not False

    @property
    def past(self) -> Past | None:
        """What Triton kernels need, or None where they do not apply."""
        return None if self._past is False else self._past

    def find(
        self, rope: Rope, queries: torch.Tensor, shape: DecodeShape | None, kv_heads: int
    ) -> None:
        """Finds out whether Triton kernels read the past, and what they need.

        Args:
            rope: Of counted positions.
            queries: `[batch_size, num_heads, q_len, head_dim]`.
            shape: Of the codec's kernels; None if it has none.
            kv_heads: Of the cache.
        """
        self._past, view = None, self._view
        if shape is None or not use_triton_attention(shape, queries):
            return
        if self._block_table is None or self._block_table[0] != view.blocks:
            table = block_table(self._layout, view.blocks, queries.device)
            self._block_table = (list(view.blocks), table)
        numbers = self._block_table[1]
        if numbers is not None:
            step = range_blocks(queries.shape[0] * kv_heads, shape, queries.element_size())
            self._past = Past.make(
                shape, self._layout, view, numbers, rope, step, causal=self._simulated
            )  # fmt: skip
