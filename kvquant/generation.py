"""Greedy generation for batches of prompts of different lengths, from any scheme's cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.cache import cache_elements, cache_nbytes
from kvquant.errors import UserError

# Looking at tokens makes the host wait for a GPU, so that is done once in so many steps there.
CHECK_EVERY_CUDA = 8

Stop = Callable[[list[int]], bool]


@dataclass(frozen=True)
class GenerationResult:
    """What :func:`greedy` returns.

    Attributes:
        tokens: New tokens of each prompt, in the order of the prompts, without the end token.
        prompt_tokens: Tokens of all prompts.
        cache_bytes: Bytes the caches had allocated after the prefill, summed over batches.
        cache_elements: Key and value elements of the prompts' tokens in those bytes.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    cache_bytes: int
    cache_elements: int


def end_ids(qm: Any) -> list[int]:
    """Token ids that end an answer, from the generation configuration or the tokenizer."""
    config = getattr(qm.model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = qm.tokenizer.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and attention mask `[batch_size, longest]`, int64, padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def cut(tokens: list[int], eos_ids: Collection[int], stop: Stop | None) -> tuple[list[int], bool]:
    """An answer up to its end, and whether it has ended.

    The end is the first end token (left out) or the first prefix for which `stop` is true (kept),
    so it does not matter how far beyond it a batch went on.
    """
    for at, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[:at], True
        if stop is not None and stop(tokens[: at + 1]):
            return tokens[: at + 1], True
    return tokens, False


def greedy(
    qm: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    batch_size: int,
    eos_ids: Collection[int] | None = None,
    stop: Stop | None = None,
    protocol: str = "A",
    on_batch: Callable[[int], None] | None = None,
) -> GenerationResult:
    """Greedy answers: one prefill a batch, then single-token steps on the same cache.

    Args:
        qm: A `kvquant.models.QuantizedModel`.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer.
        batch_size: Prompts that go through the model together.
        eos_ids: Ids that end an answer; None takes the model's own.
        stop: True for an answer (its tokens so far) that needs no further token.
        protocol: Of the caches.
        on_batch: Called with the number of prompts done.

    Raises:
        UserError: A prompt is empty or does not fit the model's positions.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index}: is empty")
        if len(prompt) + max_new_tokens > qm.max_positions:
            raise UserError(
                f"prompt {index}: {len(prompt)} tokens and {max_new_tokens} of answer, but the "
                f"model has {qm.max_positions} positions"
            )
    if max_new_tokens < 0 or batch_size < 1:
        raise UserError("max_new_tokens must not be negative, batch_size must be at least 1")
    ends = frozenset(end_ids(qm) if eos_ids is None else eos_ids)
    answers: list[list[int]] = []
    nbytes = elements = 0
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        with torch.inference_mode():
            found = _batch(qm, batch, max_new_tokens, ends, stop, protocol)
        answers += found.tokens
        nbytes += found.cache_bytes
        elements += found.cache_elements
        if on_batch is not None:
            on_batch(len(answers))
    return GenerationResult(answers, sum(map(len, prompts)), nbytes, elements)


def _batch(
    qm: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    ends: frozenset[int],
    stop: Stop | None,
    protocol: str,
) -> GenerationResult:
    device = qm.device
    pad_id = min(ends) if ends else 0  # masked, so any id serves
    ids, mask = left_pad(prompts, pad_id, device)
    lengths = mask.sum(1, keepdim=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = qm.new_cache(protocol)
    # The mask of all steps is laid out once; a step only looks at a longer piece of it.
    steps = mask.new_ones((len(prompts), max_new_tokens))
    full_mask = torch.cat((mask, steps), dim=1)
    width = ids.shape[1]
    output = qm.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    nbytes, elements = cache_nbytes(cache), cache_elements(cache, mask)
    check_every = CHECK_EVERY_CUDA if device.type == "cuda" else 1
    news: list[torch.Tensor] = []
    for step in range(max_new_tokens):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        news.append(token)
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % check_every == 0 and _all_ended(news, ends, stop):
            break
        output = qm.model(
            input_ids=token,
            attention_mask=full_mask[:, : width + step + 1],
            position_ids=lengths + step,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    rows = torch.cat(news, dim=1).tolist() if news else [[] for _ in prompts]
    answers = [cut(row, ends, stop)[0] for row in rows]
    return GenerationResult(answers, int(lengths.sum()), nbytes, elements)


def _all_ended(news: list[torch.Tensor], ends: frozenset[int], stop: Stop | None) -> bool:
    """Whether every row has ended; brings the tokens to the host."""
    rows = torch.cat(news, dim=1).tolist()
    return all(cut(row, ends, stop)[1] for row in rows)
