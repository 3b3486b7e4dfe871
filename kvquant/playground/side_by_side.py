"""Measures one prompt over several caches: answers, times in turns, memory and distances.

Answers and memory come from :func:`kvquant.models.generation.greedy`, distances from
:func:`kvquant.evaluation.perplexity.measure_windows`, of which the prompt is the one window, and
times from rounds in which the caches take turns (:func:`kvquant.benchmarks.timing.interleave`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from kvquant.benchmarks.prompt_run import PromptRun
from kvquant.benchmarks.prompts import PromptBatch
from kvquant.benchmarks.timing import Clock, interleave, summarize
from kvquant.errors import UserError
from kvquant.evaluation.perplexity import measure_windows
from kvquant.models.generation import greedy
from kvquant.models.oom_retry import fits_in_memory
from kvquant.playground.compared import Compared
from kvquant.study.percentiles import percentile
from kvquant.study.records import Percentiles

CHUNK = 256  # tokens per forward pass of protocol A, as in a study


@dataclass(frozen=True)
class Distance:
    """How far next-token distributions of the prompt are from those of the fp16 cache.

    Attributes:
        nll: Mean negative log likelihood of the prompt's tokens but the first, in nats.
        kl: Mean KL divergence from fp16's distributions, in nats.
        kl_p99: Its 99th percentile.
        top1: Fraction of tokens with the same most probable next token.
    """

    nll: float
    kl: float
    kl_p99: float
    top1: float


@dataclass
class Side:
    """One cache, and what was measured of it.

    Attributes:
        cache: The cache.
        tokens: Tokens of its greedy answer.
        cache_bytes: Bytes that the cache has allocated after the prefill.
        cache_elements: Number of key and value elements in those bytes.
        prefill: Milliseconds of each round's prefill.
        decode: Milliseconds per decode step of each round.
        distance: Distance of its distributions; None where it could not be measured.
        problem: Why something could not be measured; empty if all was.
    """

    cache: Compared
    tokens: list[int] = field(default_factory=list)
    cache_bytes: int = 0
    cache_elements: int = 0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    distance: Distance | None = None
    problem: str = ""

    def attempt(self, work: Callable[[], object]) -> None:
        """Runs `work` unless something went wrong before; memory that runs out is a result."""
        if self.problem:
            return
        try:
            if not fits_in_memory(work):
                self.problem = "out of memory"
        except UserError as error:  # NaN, for instance, which ends no other cache's measurement
            self.problem = str(error)

    def times(self, which: list[float]) -> Percentiles | None:
        """Returns the median and percentiles of rounds, or None without any."""
        return summarize(which) if which and not self.problem else None


def protocol_for(caches: list[Compared]) -> str:
    """Returns "B" if all caches can be measured under it, else "A"."""
    return "B" if all("B" in cache.scheme.protocols for cache in caches) else "A"


def agreeing(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Returns the number of leading elements in which two answers agree: tokens, or characters."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def measure(
    caches: list[Compared],
    prompt: list[int],
    *,
    new_tokens: int,
    rounds: int,
    progress: Callable[[float, float], None],
) -> list[Side]:
    """Measures all caches.

    Args:
        caches: The caches, fp16's first.
        prompt: Token ids of the prompt.
        new_tokens: Length of the longest answer in tokens; one less are timed as decode steps.
        rounds: Number of rounds of timing.
        progress: Called with the number of finished steps, and of all.
    """
    sides = [Side(cache) for cache in caches]
    total, done = len(sides) * (rounds + 2), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for side in sides:
        side.attempt(partial(_answer, side, prompt, new_tokens))
        step()

    def turn(side: Side) -> None:
        side.attempt(partial(_time, side, prompt, new_tokens - 1))
        step()

    # The answers were the warm-up. A side with a problem waits for the others' turns.
    turns: list[Callable[[], object]] = [partial(turn, side) for side in sides]
    interleave(turns, warmup=0, iterations=rounds, least=rounds, max_seconds=math.inf)
    protocol = protocol_for(caches)
    for side in sides:
        side.attempt(partial(_distance, side, prompt, protocol))
        step()
    return sides


def _answer(side: Side, prompt: list[int], new_tokens: int) -> None:
    found = greedy(side.cache.qm, [prompt], new_tokens, batch_size=1)
    side.tokens = found.tokens[0]
    side.cache_bytes, side.cache_elements = found.cache_bytes, found.cache_elements


def _time(side: Side, prompt: list[int], steps: int) -> None:
    qm = side.cache.qm
    ids = torch.tensor([prompt], device=qm.device)
    positions = torch.arange(len(prompt), device=qm.device)[None]
    run = PromptRun(qm, PromptBatch(ids, torch.ones_like(ids), positions, [len(prompt)]))
    clock, cache = Clock.of(qm.device), qm.new_cache()
    try:
        token, prefill = clock.time(lambda: run.prefill(cache))
        side.prefill.append(prefill)
        if steps:
            _, decode = clock.time(lambda: run.decode(cache, token, steps, graphs=True))
            side.decode.append(decode / steps)
    finally:
        cache.layers.clear()


def _distance(side: Side, prompt: list[int], protocol: Any) -> None:
    qm = side.cache.qm
    found = measure_windows(qm, torch.tensor([prompt], device=qm.device), protocol, CHUNK, kl=True)
    assert found.kl is not None and found.agreed is not None
    kl = found.kl[0].tolist()
    side.distance = Distance(
        nll=float(found.nll.mean()),
        kl=math.fsum(kl) / len(kl),
        kl_p99=percentile(kl, 990),
        top1=float(found.agreed.double().mean()),
    )
