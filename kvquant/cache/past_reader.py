"""Decides whether a call reads the past by the Triton kernels or by PyTorch, piece by piece.

The decision is made once per call, when its first layer brings queries. Block numbers are kept from
call to call.
"""

from __future__ import annotations

import functools

import torch

from kvquant.cache.call_rope import CallRope
from kvquant.cache.forward_plan import ForwardPlan, PackedPast, PastPieces
from kvquant.cache.layout import Layout
from kvquant.cache.packed_past import Past, block_table, range_blocks
from kvquant.cache.past_pieces import cut_past
from kvquant.kernels.backends import Backend, select
from kvquant.kernels.cache_shape import CacheShape
from kvquant.kernels.prompt_backend import select_prompt

# Max key elements per layer that protocol B reads back at once (0.5 GB with values, in fp32).
MAX_READ_BACK = 1 << 26


class PastReader:
    """Decides for one cache how its calls read the past."""

    def __init__(self) -> None:
        # Block counts of the sequences and the kernels' table of block numbers on each device.
        self._numbers: dict[torch.device, tuple[list[int], torch.Tensor]] = {}

    def forget_blocks(self) -> None:
        """Drops the block numbers after the blocks of sequences have changed."""
        self._numbers.clear()

    def path(
        self,
        plan: ForwardPlan,
        layout: Layout,
        rope: CallRope,
        shape: CacheShape,
        queries: torch.Tensor,
        keys: torch.Tensor,
    ) -> PackedPast | PastPieces:
        """Decides how a call reads the past.

        Args:
            plan: The plan of the call.
            layout: Layout of the cache.
            rope: Rotation of the tokens.
            shape: The properties of the cache that decide which kernels read it.
            queries: `[batch_size, num_heads, new_len, head_dim]`.
            keys: `[batch_size, num_kv_heads, new_len, head_dim]`.
        """
        # The query of a single column sees every earlier key; other queries compare positions.
        causal = plan.simulated and queries.shape[2] > 1
        device = plan.query_positions.device
        # Where the model's own attention follows, no scores of pieces are in memory.
        scores = torch.Size((1,) * 4) if plan.whole else queries.shape
        cut = functools.partial(
            cut_past, layout, plan.view, rope.read, scores, device, causal=causal
        )
        small = plan.simulated and plan.first and plan.token_positions is None
        whole = plan.whole or (small and keys.numel() <= MAX_READ_BACK)
        pieces = PastPieces(functools.cache(cut), whole)
        if select("past", shape, queries.device).backend != "triton":
            return pieces
        prompt: Backend | None = None
        if plan.whole:
            prompt = select_prompt(queries.shape[3], queries.dtype, queries.device).backend
            if prompt == "pytorch":
                return pieces
        numbers, read = self._block_numbers(layout, plan.view.blocks, device), shape.decode_shape
        step = range_blocks(queries.shape[0] * keys.shape[1], read, queries.element_size())
        past = Past.make(
            read, layout, plan.view, numbers, rope.counted, step, causal=plan.simulated
        )
        return PackedPast(past, pieces, prompt)

    def _block_numbers(
        self, layout: Layout, blocks: list[int], device: torch.device
    ) -> torch.Tensor:
        found = self._numbers.get(device)
        if found is None or found[0] != blocks:
            found = self._numbers[device] = list(blocks), block_table(layout, blocks, device)
        return found[1]
