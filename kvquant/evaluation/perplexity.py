"""Perplexity over non-overlapping windows of one long text.

Protocol B is one forward pass per window, in which every token attends to quantized keys and
values. Protocol A feeds the window in chunks, each of which attends to itself in full precision and
to earlier tokens in the packed cache.

Several windows form one batch. They are equally long, so nothing is padded, and the results of a
window are the same in any batch but for rounding. Schemes for which this does not hold (`batches`)
get one window at a time.

A window's first token is not scored. With `bos` the BOS token takes its place, so that the same
tokens are scored either way.

The same windows also go through the unquantized cache in the same pieces, for the KL divergence of
each next-token distribution and for whether its most probable token is the same. Both show damage
that perplexity averages out. Of every token of a seed one divergence is kept until the seed ends,
and of a window the number of agreeing tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.cache.attending import Protocol
from kvquant.cache.footprint import cache_elements, cache_nbytes, shared_nbytes
from kvquant.errors import UserError
from kvquant.evaluation.base import Context, SuiteResult, check_length, encode
from kvquant.evaluation.divergence import divergence, largest_by_window, same_top1
from kvquant.models.finite import not_finite
from kvquant.models.model_call import cache_argument
from kvquant.models.oom_retry import in_batches, retry_on_overflow
from kvquant.study.sample_types import perplexity_summary
from kvquant.study.tasks import PerplexityTask

LOGIT_POSITIONS = 512  # positions, over all windows, whose logits are in memory at a time


@dataclass(frozen=True)
class WindowLosses:
    """Holds the losses and cache sizes of a batch of windows.

    Attributes:
        nll: Negative log likelihood of each token but the first, in nats, float64
            `[windows, window - 1]` on the host.
        kl: KL divergence in nats of the same predictions from those of the unquantized cache, in
            the same shape; None if it was not measured.
        agreed: Whether the most probable token is that of the unquantized cache, bool of the same
            shape; None if it was not measured.
        cache_bytes: Bytes that the caches of these windows would allocate, one cache per window.
        cache_elements: Number of key and value elements in those bytes.
    """

    nll: torch.Tensor
    kl: torch.Tensor | None
    agreed: torch.Tensor | None
    cache_bytes: int
    cache_elements: int


def window_starts(tokens: int, window: int, windows: int, seed: int) -> list[int]:
    """Returns the first tokens of a seed's windows, ascending and without overlap.

    Seed 0 starts at the first token, as is usual, and other seeds at a random offset below one
    window. If fewer windows are asked for than fit, the seed draws them.

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
) -> Iterator[tuple[list[torch.Tensor], slice]]:
    """Yields logits of windows from several caches, a few positions at a time.

    Args:
        qm: A `QuantizedModel`.
        ids: int64 `[windows, window]`.
        caches: Empty caches, which are filled.
        step: Number of tokens per forward pass.

    Yields:
        One fp32 tensor `[windows, positions, vocabulary]` per cache, and the positions.
    """
    decoder = qm.model.model
    windows, window = ids.shape
    size = max(1, LOGIT_POSITIONS // windows)
    for first in range(0, window, step):
        piece = ids[:, first : first + step]
        hidden = [
            decoder(
                input_ids=piece, **cache_argument(decoder, cache), use_cache=True
            ).last_hidden_state
            for cache in caches
        ]
        stop = min(first + step, window - 1)  # the last token has no next one
        for low in range(first, stop, size):
            high = min(low + size, stop)
            yield (
                [qm.logits(h[:, low - first : high - first]).float() for h in hidden],
                slice(low, high),
            )


@torch.inference_mode()
def measure_windows(
    qm: Any, ids: torch.Tensor, protocol: Protocol, chunk: int, *, kl: bool = False
) -> WindowLosses:
    """Measures the losses of windows that go through the model together.

    Args:
        qm: A `QuantizedModel`.
        ids: int64 `[windows, window]`, on the model's device.
        protocol: "A" or "B".
        chunk: Number of tokens per forward pass in protocol A.
        kl: Whether to run the windows through the unquantized cache, too, in the same pieces.

    Raises:
        NonFinite: A loss or divergence is NaN or infinite.
    """
    goals = ids[:, 1:]
    nll = torch.zeros(goals.shape, dtype=torch.float32, device=ids.device)
    # What the unquantized cache itself has:
    kls, agreed = torch.zeros_like(nll), torch.ones_like(goals, dtype=torch.bool)

    def work(cache: Any) -> tuple[int, int]:
        caches = [cache, qm.baseline_cache()] if kl and qm.approximates else [cache]
        pieces = _pieces(qm, ids, caches, ids.shape[1] if protocol == "B" else chunk)
        try:
            for logits, where in pieces:
                flat = logits[0].flatten(0, 1)  # on the last GPU, where there are several
                goal = goals[:, where].to(flat.device)
                losses = torch.nn.functional.cross_entropy(flat, goal.flatten(), reduction="none")
                nll[:, where] = losses.view_as(goal)
                if len(caches) == 2:
                    kls[:, where] = divergence(logits[1], logits[0])
                    agreed[:, where] = same_top1(logits[1], logits[0])
        finally:  # `retry_on_overflow` empties the other cache
            for other in caches[1:]:
                other.layers.clear()
        shared = (ids.shape[0] - 1) * shared_nbytes(cache)
        return cache_nbytes(cache) + shared, cache_elements(cache)

    nbytes, elements = retry_on_overflow(lambda: qm.new_cache(protocol), work)
    found = WindowLosses(
        nll.double().cpu(),
        kls.double().cpu() if kl else None,
        agreed.cpu() if kl else None,
        nbytes,
        elements,
    )
    for losses, what in ((found.nll, "losses"), (found.kl, "divergences")):
        if losses is not None and not losses.isfinite().all():
            window, at = (~losses.isfinite()).nonzero()[0].tolist()
            raise not_finite(qm, f"{what} from token {at + 1} of window {window} on")
    return found


def _first_token(tokenizer: Any, task: str) -> list[int]:
    """Returns the BOS token, which a task with `bos` puts in the place of each first token.

    Raises:
        UserError: The tokenizer has none.
    """
    if tokenizer.bos_token_id is None:
        raise UserError(f"tasks.{task}.bos: the model's tokenizer has no BOS token: leave bos out")
    return [int(tokenizer.bos_token_id)]


def run_perplexity(context: Context, spec: PerplexityTask, seed: int) -> SuiteResult:
    """Measures the perplexity of a seed's windows: exp of the mean loss over scored tokens."""
    qm = context.qm
    window = spec.window or qm.max_positions
    check_length(context, window, 0, "window")
    ids = encode(qm.tokenizer, context.text("test"), special=False)
    first = _first_token(qm.tokenizer, context.task) if spec.bos else []
    try:
        starts = window_starts(len(ids), window, spec.windows, seed)
    except UserError as error:
        raise UserError(f"tasks.{context.task}.{error}") from None
    rows: list[dict[str, Any]] = []
    kls = torch.zeros(len(starts), window - 1)  # of all tokens, as percentiles are over all
    nbytes = elements = 0

    def work(indices: list[int]) -> WindowLosses:
        spans = [(starts[index] + len(first), starts[index] + window) for index in indices]
        pieces = [first + ids[low:high] for low, high in spans]
        batch = torch.tensor(pieces, device=qm.device)
        return measure_windows(qm, batch, spec.protocol, spec.chunk, kl=spec.kl)

    for indices, found in in_batches(
        [window] * len(starts),
        work,
        batch_size=spec.batch_size if qm.scheme.batches else 1,
        batch_tokens=context.batch_tokens,
    ):
        nbytes += found.cache_bytes
        elements += found.cache_elements
        for at, index in enumerate(indices):
            nll = found.nll[at].tolist()
            row: dict[str, Any] = {"index": index, "start": starts[index], "tokens": len(nll)}
            row["nll"] = math.fsum(nll)
            if found.kl is not None and found.agreed is not None:
                row["kl"] = math.fsum(found.kl[at].tolist())
                row["top1_agreed"] = int(found.agreed[at].sum())
                kls[index] = found.kl[at]
            rows.append(row)
        context.progress(len(rows), len(starts))
    if spec.kl:
        tails = largest_by_window(kls.flatten(), [window - 1] * len(starts))
        for row in rows:
            row["kl_tail"] = tails[row["index"]]
    summary = perplexity_summary(rows)
    return SuiteResult(
        metric="perplexity",
        higher_is_better=False,
        value=summary.metrics["perplexity"],
        metrics=summary.metrics,
        protocol=spec.protocol,
        rows=rows,
        tokens=summary.tokens,
        cache_bytes=nbytes,
        cache_elements=elements,
    )
