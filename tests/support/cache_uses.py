"""The uses of a cache that tests compare, and models whose scores depend on positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support.caches import ids, ragged, step


def sharpen(model: Any) -> None:
    """Makes queries and keys larger; norms of queries and keys undo it, and make scores of 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 6
            if name.endswith("qkv_proj.weight"):
                parameter[: len(parameter) * 3 // 4] *= 6


PARTS = (50, 44, 1, 1, 1, 1, 1)  # the third step fills a block of 32 tokens behind a sink
LENGTH = sum(PARTS)


def fed(model: Any, cache: Any) -> torch.Tensor:
    """A prompt in chunks, and then decode steps."""
    parts = ids(2, LENGTH).split(list(PARTS), 1)
    return torch.cat([step(model, cache, part) for part in parts], 1)


def padded(side: str) -> Callable[[Any, Any], torch.Tensor]:
    """A ragged batch in chunks of several tokens and of one; its tokens' logits alone."""

    def logits(model: Any, cache: Any) -> torch.Tensor:
        _, tokens, mask = ragged([90, 47, 71], side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found, at = [], 0
        for size in (60, 1, 29):
            part = slice(at, at + size)
            with torch.inference_mode():
                out = model(
                    input_ids=tokens[:, part],
                    attention_mask=mask[:, : at + size],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                )
            found.append(out.logits)
            at += size
        return torch.cat(found, 1)[mask.bool()]

    return logits


def cropped(model: Any, cache: Any) -> torch.Tensor:
    """More tokens behind a cut, in place of those before."""
    step(model, cache, ids(2, 90))
    cache.crop(-33)
    assert cache.get_seq_length() == 57
    parts = ids(2, 40, 1).split([30, 1, 9], 1)
    return torch.cat([step(model, cache, part) for part in parts], 1)


def reordered(model: Any, cache: Any) -> torch.Tensor:
    """More tokens over sequences that beam search chose."""
    step(model, cache, ids(3, 60))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    return step(model, cache, ids(3, 20, 1))


USES: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "chunks and steps": fed,
    "left padding": padded("left"),
    "right padding": padded("right"),
    "crop": cropped,
    "a reordered batch": reordered,
}
