"""Perplexity over non-overlapping windows of one long text.

Protocol B is one forward pass a window in which every token attends to quantized keys and values.
Protocol A feeds the window in chunks: a chunk attends to itself in full precision and to what came
before from the packed cache.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from kvquant.cache import cache_elements, cache_nbytes
from kvquant.config import PerplexityTask
from kvquant.errors import UserError
from kvquant.evaluation.base import Context, SuiteResult, check_length, encode

LOGIT_POSITIONS = 256  # logits of so many positions are in memory at a time


def window_starts(tokens: int, window: int, windows: int, seed: int) -> list[int]:
    """First tokens of a seed's windows, ascending and without overlap.

    Seed 0 cuts from the first token on, as is usual; the others from a random offset below one
    window. Where fewer windows are asked for than fit, the seed draws them.

    Raises:
        UserError: The text is too short.
    """
    rng = random.Random(f"perplexity {seed}")
    room = tokens - window * max(windows, 1)
    if room < 0:
        raise UserError(
            f"window: {max(windows, 1)} windows of {window} tokens, but the text has {tokens}"
        )
    offset = 0 if seed == 0 else rng.randrange(min(window - 1, room) + 1)
    slots = (tokens - offset) // window
    chosen = range(slots) if windows == 0 else sorted(rng.sample(range(slots), windows))
    return [offset + slot * window for slot in chosen]


def window_nll(qm: Any, ids: torch.Tensor, protocol: str, chunk: int) -> tuple[list[float], Any]:
    """Negative log likelihood of each token but the first, and the cache.

    Args:
        qm: A `QuantizedModel`.
        ids: int64 `[1, window]`, on the model's device.
        protocol: "A" or "B".
        chunk: Tokens a forward pass in protocol A.

    Returns:
        `window - 1` values in nats, and the filled cache.
    """
    cache = qm.new_cache(protocol)
    window = ids.shape[1]
    step = window if protocol == "B" else chunk
    head = qm.model.get_output_embeddings()
    losses: list[torch.Tensor] = []
    with torch.inference_mode():
        for first in range(0, window, step):
            piece = ids[:, first : first + step]
            hidden = qm.model.model(
                input_ids=piece, past_key_values=cache, use_cache=True
            ).last_hidden_state[0]
            targets = ids[0, first + 1 : first + step + 1]
            for low in range(0, targets.shape[0], LOGIT_POSITIONS):
                goal = targets[low : low + LOGIT_POSITIONS]
                logits = head(hidden[low : low + goal.shape[0]]).float()
                losses.append(torch.nn.functional.cross_entropy(logits, goal, reduction="none"))
    return torch.cat(losses).double().tolist(), cache


def run_perplexity(context: Context, spec: PerplexityTask, seed: int) -> SuiteResult:
    """exp of the mean negative log likelihood over all scored tokens of a seed's windows."""
    check_length(context, spec.window, 0, "window")
    qm = context.qm
    ids = encode(qm.tokenizer, context.text("test"), special=False)
    try:
        starts = window_starts(len(ids), spec.window, spec.windows, seed)
    except UserError as error:
        raise UserError(f"tasks.{context.task}.{error}") from None
    rows: list[dict[str, Any]] = []
    nbytes = elements = scored = 0
    sums: list[float] = []
    for index, start in enumerate(starts):
        window = torch.tensor([ids[start : start + spec.window]], device=qm.device)
        losses, cache = window_nll(qm, window, spec.protocol, spec.chunk)
        total = math.fsum(losses)
        nbytes += cache_nbytes(cache)
        elements += cache_elements(cache)
        del cache
        scored += len(losses)
        sums.append(total)
        rows.append({"index": index, "start": start, "tokens": len(losses), "nll": total})
        context.progress(index + 1, len(starts))
    mean = math.fsum(sums) / scored
    value = math.exp(mean)
    return SuiteResult(
        metric="perplexity",
        higher_is_better=False,
        value=value,
        metrics={"perplexity": value, "nll": mean},
        protocol=spec.protocol,
        rows=rows,
        tokens=spec.window * len(starts),
        cache_bytes=nbytes,
        cache_elements=elements,
    )
