"""Prefills a batch of prompts into a cache and decodes from it, as benchmarks time both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvquant.benchmarks.prompts import PromptBatch
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.models.loading import QuantizedModel
from kvquant.models.model_call import cache_argument
from kvquant.models.sdpa import without_cudnn


@dataclass
class PromptRun:
    """Runs a batch of prompts over caches of one model.

    Attributes:
        qm: The model with the scheme's caches.
        batch: The prompts.
    """

    qm: QuantizedModel
    batch: PromptBatch

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Returns the most likely next token of each prompt, `[batch_size, 1]`."""
        logits = self.qm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **cache_argument(self.qm.model, cache),
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def prefill(self, cache: Any) -> torch.Tensor:
        """Runs the prompts and returns the first answer tokens `[batch_size, 1]`."""
        batch = self.batch
        # Without padding there is no mask, so that attention uses its fastest kernel on both sides.
        mask = batch.mask if batch.padded else None
        return self._forward(batch.ids, mask, batch.positions, cache)

    @torch.inference_mode()
    def decode(self, cache: Any, token: torch.Tensor, steps: int, *, graphs: bool = False) -> None:
        """Decodes `steps` further tokens greedily, without a check for end tokens.

        Args:
            cache: The cache after the prefill.
            token: The first token of each answer, `[batch_size, 1]`.
            steps: Number of tokens.
            graphs: Whether the model may capture its steps, which would blur the time of one.
        """
        batch = self.batch
        if isinstance(cache, KVQuantCache):
            cache.graphs = graphs
        width, last = batch.ids.shape[1], batch.positions[:, -1:]
        ones = batch.mask.new_ones((batch.mask.shape[0], steps))
        mask = torch.cat([batch.mask, ones], 1) if batch.padded else None
        with without_cudnn():
            for step in range(1, steps + 1):
                seen = None if mask is None else mask[:, : width + step]
                token = self._forward(token, seen, last + step, cache)
