"""Greedy generation over a quantized cache, for ragged batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvquant.cache import cache_elements, cache_nbytes
from kvquant.errors import UserError
from kvquant.models import QuantizedModel


@dataclass
class Generated:
    """New tokens of each prompt and what the caches took.

    Attributes:
        tokens: New token ids, up to and without the end token.
        cache_bytes: Allocated bytes after the last step, summed over batches.
        cache_elements: Key and value elements in them.
    """

    tokens: list[list[int]]
    cache_bytes: int
    cache_elements: int


def pad_left(
    prompts: list[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and positions `[batch_size, longest]`, padded on the left."""
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


def end_tokens(qm: QuantizedModel) -> set[int]:
    """The ids that end an answer."""
    ids = qm.model.generation_config.eos_token_id
    if ids is None:
        ids = qm.tokenizer.eos_token_id
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list | tuple) else {int(ids)}


@torch.inference_mode()
def _batch(
    qm: QuantizedModel, prompts: list[list[int]], max_new_tokens: int, ends: set[int]
) -> Generated:
    ids, mask, positions = pad_left(prompts, 0, qm.device)
    cache = qm.new_cache("A")
    buffer = torch.zeros((len(prompts), max_new_tokens), dtype=torch.long, device=qm.device)
    stop = torch.tensor(sorted(ends), dtype=torch.long, device=qm.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=qm.device)
    every = 1 if qm.device.type == "cpu" else 8  # looking at `done` waits for the device
    steps = 0
    last = positions[:, -1:]
    for step in range(max_new_tokens):
        logits = qm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        buffer[:, step : step + 1] = ids
        done |= torch.isin(ids[:, 0], stop)
        steps = step + 1
        if steps == max_new_tokens or (steps % every == 0 and bool(done.all())):
            break
        mask = torch.cat([mask, mask.new_ones((len(prompts), 1))], 1)
        last = last + 1
        positions = last
    rows = []
    for row in buffer[:, :steps].tolist():
        cut = next((i for i, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:cut])
    held = mask[:, : cache.get_seq_length()]
    return Generated(rows, cache_nbytes(cache), cache_elements(cache, held))


def greedy(
    qm: QuantizedModel, prompts: list[list[int]], max_new_tokens: int, *, batch_size: int
) -> Generated:
    """Greedy continuations; each prompt's answer does not depend on the batch it is in.

    Args:
        qm: The model with its cache scheme (protocol A).
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer.
        batch_size: Prompts a batch; prompts of similar length go together.

    Raises:
        UserError: A prompt is empty, or prompt and answer exceed the model's positions.
    """
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number}: empty; give at least one token")
        if len(prompt) + max_new_tokens > qm.max_positions:
            raise UserError(
                f"prompt {number}: {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"model's {qm.max_positions} positions; shorten the task's length"
            )
    ends = end_tokens(qm)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    tokens: list[list[int]] = [[] for _ in prompts]
    total = Generated(tokens, 0, 0)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        part = _batch(qm, [prompts[i] for i in chosen], max_new_tokens, ends)
        for i, answer in zip(chosen, part.tokens, strict=True):
            tokens[i] = answer
        total.cache_bytes += part.cache_bytes
        total.cache_elements += part.cache_elements
    return total
