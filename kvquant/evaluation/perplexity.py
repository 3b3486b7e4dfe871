"""Perplexity over non-overlapping windows of one long text.

Protocol B is one forward pass a window in which every token attends to quantized keys and values.
Protocol A feeds the window in chunks: a chunk attends to itself in full precision and to what came
before from the packed cache.

The same windows also go through the unquantized cache, piece by piece beside the measured one, for
the KL divergence of the next-token distribution, which shows damage that perplexity averages out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.cache import Protocol
from kvquant.cache_size import cache_elements, cache_nbytes
from kvquant.config import PerplexityTask
from kvquant.errors import UserError
from kvquant.evaluation.base import Context, SuiteResult, check_length, encode

LOGIT_POSITIONS = 256  # logits of so many positions are in memory at a time


@dataclass(frozen=True)
class WindowLosses:
    """What one window gives.

    Attributes:
        nll: Negative log likelihood of each token but the first, in nats.
        kl: KL divergence of the same predictions from the unquantized cache's, in nats; empty if
            it was not asked for.
        cache: The filled cache.
    """

    nll: list[float]
    kl: list[float]
    cache: Any


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


def _pieces(
    qm: Any, ids: torch.Tensor, caches: list[Any], step: int
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Logits of one window from several caches, few positions at a time.

    Args:
        qm: A `QuantizedModel`.
        ids: int64 `[1, window]`.
        caches: Empty caches, which are filled.
        step: Tokens a forward pass.

    Yields:
        One fp32 tensor `[positions, vocabulary]` a cache, and the next tokens `[positions]`.
    """
    head = qm.model.get_output_embeddings()
    for first in range(0, ids.shape[1], step):
        piece = ids[:, first : first + step]
        hidden = [
            qm.model.model(input_ids=piece, past_key_values=cache, use_cache=True)
            for cache in caches
        ]
        targets = ids[0, first + 1 : first + step + 1]
        for low in range(0, targets.shape[0], LOGIT_POSITIONS):
            goal = targets[low : low + LOGIT_POSITIONS]
            high = low + goal.shape[0]
            yield [head(h.last_hidden_state[0, low:high]).float() for h in hidden], goal


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats of a distribution from its reference, `[positions]`.

    Args:
        reference: Logits of the unquantized cache, fp32 `[positions, vocabulary]`.
        logits: Logits of the measured cache, the same shape.
    """
    expected = reference.log_softmax(-1)
    return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)


def measure_window(
    qm: Any, ids: torch.Tensor, protocol: Protocol, chunk: int, *, kl: bool = False
) -> WindowLosses:
    """Losses of one window.

    Args:
        qm: A `QuantizedModel`.
        ids: int64 `[1, window]`, on the model's device.
        protocol: "A" or "B".
        chunk: Tokens a forward pass in protocol A.
        kl: Also run the window through the unquantized cache, in the same pieces.
    """
    cache = qm.new_cache(protocol)
    caches = [cache, qm.baseline_cache()] if kl and qm.quantizes else [cache]
    step = ids.shape[1] if protocol == "B" else chunk
    nll: list[torch.Tensor] = []
    kls: list[torch.Tensor] = []
    with torch.inference_mode():
        for logits, goal in _pieces(qm, ids, caches, step):
            nll.append(torch.nn.functional.cross_entropy(logits[0], goal, reduction="none"))
            if len(caches) == 2:
                kls.append(divergence(logits[1], logits[0]))
            elif kl:
                kls.append(torch.zeros_like(nll[-1]))  # the unquantized cache itself

    def numbers(parts: list[torch.Tensor]) -> list[float]:
        return torch.cat(parts).double().tolist() if parts else []

    return WindowLosses(numbers(nll), numbers(kls), cache)


def run_perplexity(context: Context, spec: PerplexityTask, seed: int) -> SuiteResult:
    """exp of the mean negative log likelihood over all scored tokens of a seed's windows."""
    qm = context.qm
    window = spec.window or qm.max_positions
    check_length(context, window, 0, "window")
    ids = encode(qm.tokenizer, context.text("test"), special=False)
    try:
        starts = window_starts(len(ids), window, spec.windows, seed)
    except UserError as error:
        raise UserError(f"tasks.{context.task}.{error}") from None
    rows: list[dict[str, Any]] = []
    nbytes = elements = scored = 0
    sums: list[float] = []
    kl_sums: list[float] = []
    for index, start in enumerate(starts):
        piece = torch.tensor([ids[start : start + window]], device=qm.device)
        found = measure_window(qm, piece, spec.protocol, spec.chunk, kl=spec.kl)
        tokens = len(found.nll)
        nbytes += cache_nbytes(found.cache)
        elements += cache_elements(found.cache)
        scored += tokens
        sums.append(math.fsum(found.nll))
        row = {"index": index, "start": start, "tokens": tokens, "nll": sums[-1]}
        if spec.kl:
            kl_sums.append(math.fsum(found.kl))
            row["kl"] = kl_sums[-1]
        rows.append(row)
        del found  # its cache, before the next window's
        context.progress(index + 1, len(starts))
    mean = math.fsum(sums) / scored
    metrics = {"perplexity": math.exp(mean), "nll": mean, "window": float(window)}
    if spec.kl:
        metrics["kl"] = math.fsum(kl_sums) / scored
    return SuiteResult(
        metric="perplexity",
        higher_is_better=False,
        value=metrics["perplexity"],
        metrics=metrics,
        protocol=spec.protocol,
        rows=rows,
        tokens=window * len(starts),
        cache_bytes=nbytes,
        cache_elements=elements,
    )
