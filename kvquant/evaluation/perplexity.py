"""Perplexity over non-overlapping windows, with the cache in the loop.

Protocol B: each window is one forward pass in which every token attends to quantized keys and
values. Protocol A: the window comes in chunks; a chunk attends to itself in full precision and to
the earlier ones from the quantized cache.
"""

from __future__ import annotations

import math

import torch

from kvquant.cache import cache_elements, cache_nbytes
from kvquant.config import PerplexityTask
from kvquant.data import load_text
from kvquant.errors import UserError
from kvquant.evaluation.base import SuiteResult
from kvquant.models import QuantizedModel


def windows(ids: list[int], task: PerplexityTask, seed: int) -> list[list[int]]:
    """The windows of one seed.

    With `task.windows` = n > 0, seed s takes the windows s*n to s*n + n - 1, so seeds never share
    text. With 0, all windows are taken and the seed moves the first one's offset.

    Raises:
        UserError: The text is too short for this seed.
    """
    size = task.window
    if task.windows:
        first = seed * task.windows
        if (first + task.windows) * size > len(ids):
            raise UserError(
                f"windows: seed {seed} needs tokens up to {(first + task.windows) * size:,}, the "
                f"text has {len(ids):,}; use fewer windows or a shorter window"
            )
        starts = [(first + i) * size for i in range(task.windows)]
    else:
        offset = (seed * size) // 8 % size
        starts = list(range(offset, len(ids) - size + 1, size))
        if not starts:
            raise UserError(f"window: {size} tokens, but the text has only {len(ids):,}")
    return [ids[s : s + size] for s in starts]


@torch.inference_mode()
def window_loss(
    qm: QuantizedModel, window: list[int], task: PerplexityTask
) -> tuple[float, int, int]:
    """Summed negative log likelihood (nats) of a window's tokens but the first; cache bytes and
    elements at its end."""
    ids = torch.tensor([window], device=qm.device)
    cache = qm.new_cache(task.protocol)
    step = len(window) if task.protocol == "B" else task.chunk
    total = 0.0
    previous: torch.Tensor | None = None
    for start in range(0, len(window), step):
        chunk = ids[:, start : start + step]
        logits = qm.model(input_ids=chunk, past_key_values=cache, use_cache=True).logits[0].float()
        scores = logits if previous is None else torch.cat([previous, logits])
        targets = ids[0, start + (previous is None) : start + chunk.shape[1]]
        scores = scores[:-1]
        loss = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
        total += float(loss.double().sum())
        previous = logits[-1:]
    return total, cache_nbytes(cache), cache_elements(cache)


def run(qm: QuantizedModel, task: PerplexityTask, seed: int, data: str | None) -> SuiteResult:
    """Evaluates one seed."""
    if task.window > qm.max_positions:
        raise UserError(f"window: {task.window} exceeds the model's {qm.max_positions} positions")
    if data is None:
        raise UserError("--data-manifest: needed for perplexity")
    ids = qm.tokenizer(load_text(data), add_special_tokens=False, verbose=False).input_ids
    samples = []
    nll, count, nbytes, elements = 0.0, 0, 0, 0
    for number, window in enumerate(windows(ids, task, seed)):
        loss, held, stored = window_loss(qm, window, task)
        predicted = len(window) - 1
        samples.append(
            {"sample_id": f"{seed}-{number}", "score": loss / predicted, "tokens": predicted}
        )
        nll, count = nll + loss, count + predicted
        nbytes, elements = nbytes + held, elements + stored
    mean = nll / count
    return SuiteResult(
        protocol=task.protocol,
        metric="perplexity",
        higher_is_better=False,
        metrics={"perplexity": math.exp(mean), "nll": mean},
        samples=samples,
        tokens=count + len(samples),
        cache_bytes=nbytes,
        cache_elements=elements,
    )
