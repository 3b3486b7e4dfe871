"""Deterministic batches of prompts from a text: equal lengths, or ragged and padded on the left.

Random tokens would not do: a model's keys and values of them are unlike those of text, with far
more outliers than a quantizer expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvquant.errors import UserError
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
    workload: Workload, text: Sequence[int], seed: int, device: torch.device
) -> PromptBatch:
    """Returns prompts that begin at random places of a text, the same for every scheme and device.

    A prompt that reaches the end of the text goes on at its beginning.

    Args:
        workload: The workload, for prompt length, batch size and raggedness.
        text: Token ids of the text.
        seed: Seed of the random generator, the number of the repetition.
        device: Device of the tensors.

    Raises:
        UserError: The text has no token.
    """
    if not text:
        raise UserError("--data-manifest: the text has no token for prompts; name another data set")
    generator = torch.Generator().manual_seed(seed)
    lengths = prompt_lengths(workload)
    starts = torch.randint(len(text), (len(lengths),), generator=generator).tolist()
    prompts = [
        [text[(start + i) % len(text)] for i in range(n)]
        for start, n in zip(starts, lengths, strict=True)
    ]
    ids, mask = left_pad(prompts, 0, device)
    return PromptBatch(ids, mask, (mask.cumsum(1) - 1).clamp_(min=0), lengths)
