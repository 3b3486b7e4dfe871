"""Deterministic batches of prompts: equal lengths, or ragged and padded on the left."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.models.generation import left_pad
from kvquant.study.prompt_lengths import prompt_lengths
from kvquant.study.timing import Workload

__all__ = ["PromptBatch", "prompt_batch", "prompt_lengths"]


@dataclass(frozen=True)
class PromptBatch:
    """Holds a batch of prompts, in which all tensors are int64 `[batch_size, longest]`.

    Attributes:
        ids: Token ids.
        mask: 1 = token, 0 = padding.
        positions: Position of each token in its own prompt; 0 under padding.
        lengths: Tokens of each prompt.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Number of tokens of all prompts, without padding."""
        return sum(self.lengths)

    @property
    def padded(self) -> bool:
        """Whether any prompt is shorter than the longest."""
        return min(self.lengths) < max(self.lengths)


def prompt_batch(
    workload: Workload, vocabulary: int, seed: int, device: torch.device
) -> PromptBatch:
    """Returns random prompts, which are the same for every scheme and device.

    Args:
        workload: The workload, for prompt length, batch size and raggedness.
        vocabulary: Ids are drawn from `[0, vocabulary)`.
        seed: Seed of the random generator, the number of the repetition.
        device: Device of the tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = prompt_lengths(workload)
    prompts = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    ids, mask = left_pad(prompts, 0, device)
    return PromptBatch(ids, mask, (mask.cumsum(1) - 1).clamp_(min=0), lengths)
