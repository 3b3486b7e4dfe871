"""How far next-token distributions are from those of the unquantized cache.

The mean divergence of tokens hides the few at which a cache goes wrong. Their percentiles over all
tokens of a seed and the share of tokens with the same most probable next token show them
(:func:`kvquant.study.sample_types.perplexity_summary` defines both).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvquant.study.sample_types import tail_size


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Returns the KL divergence of distributions from their reference, in nats, fp32 `[...]`.

    A token that the reference excludes (a logit of minus infinity) adds nothing. One that only the
    measured distribution excludes makes the divergence infinite.

    Args:
        reference: Logits of the unquantized cache, fp32 `[..., vocabulary]`.
        logits: Logits of the measured cache, the same shape.
    """
    expected = reference.log_softmax(-1)
    terms = expected.exp() * (expected - logits.log_softmax(-1))
    return terms.masked_fill_(expected.isneginf(), 0).sum(-1)


def same_top1(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Returns whether distributions have the reference's most probable token, bool `[...]`.

    Of equal logits the first token of the vocabulary counts, as in greedy decoding.

    Args:
        reference: Logits of the unquantized cache, `[..., vocabulary]`.
        logits: Logits of the measured cache, the same shape.
    """
    return reference.argmax(-1) == logits.argmax(-1)


def largest_by_window(divergences: torch.Tensor, tokens: Sequence[int]) -> list[list[float]]:
    """Returns the divergences of each window that are among the seed's largest, descending.

    They are as many as percentiles over the seed depend on
    (:func:`kvquant.study.sample_types.tail_size`). Of equal ones the first are taken. Each is the
    shortest decimal that reads as the same float32.

    Args:
        divergences: Divergences of all tokens of a seed, window by window, fp32 on the host.
        tokens: Number of tokens of each window.
    """
    least = divergences.topk(tail_size(len(divergences))).values[-1]
    equal = tail_size(len(divergences)) - int((divergences > least).sum())
    found = []
    for window in divergences.split(list(tokens)):
        more = min(equal, int((window == least).sum()))
        equal -= more
        values = torch.cat(
            [window[window > least].sort(descending=True).values, least.repeat(more)]
        )
        found.append([float(str(value)) for value in values.numpy()])
    return found
