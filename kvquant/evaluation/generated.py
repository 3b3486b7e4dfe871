"""What the suites of generated answers share: prompts of several seeds answered in shared batches.

A decode step costs a GPU about the same for ten prompts as for a hundred, so seeds go through the
model together as far as a task's batch size allows. Which seeds that are changes no answer; the
bytes of a batch are shared out by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvquant.evaluation.base import Context, SuiteResult
from kvquant.generation import Stop, greedy


@dataclass(frozen=True)
class Prepared:
    """One seed of a task, ready to be answered.

    Attributes:
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer.
        batch_size: Prompts that go through the model together.
        score: (index of the prompt, answer) to the fields of its record, among them `score` from
            0 to 1 and `answer`.
        metric: Name of the mean score in percent.
        stop: True for an answer that needs no further token.
        metrics: Further metrics.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    batch_size: int
    score: Callable[[int, str], dict[str, Any]]
    metric: str = "score"
    stop: Stop | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def answer_seeds(context: Context, seeds: Sequence[Prepared]) -> list[SuiteResult]:
    """The results of seeds of one task, answered together."""
    first = seeds[0]
    prompts = [prompt for seed in seeds for prompt in seed.prompts]
    found = greedy(
        context.qm,
        prompts,
        first.max_new_tokens,
        batch_size=first.batch_size,
        batch_tokens=context.batch_tokens,
        stop=first.stop,
        on_batch=lambda done: context.progress(done, len(prompts)),
    )
    results, at = [], 0
    for seed in seeds:
        mine = slice(at, at + len(seed.prompts))
        at = mine.stop
        rows = []
        for index, tokens in enumerate(found.tokens[mine]):
            answer = str(context.qm.tokenizer.decode(tokens, skip_special_tokens=True))
            size = len(seed.prompts[index])
            rows.append({"index": index, "prompt_tokens": size, **seed.score(index, answer)})
        value = 100.0 * sum(row["score"] for row in rows) / len(rows)
        results.append(
            SuiteResult(
                metric=seed.metric,
                higher_is_better=True,
                value=value,
                metrics={seed.metric: value, **seed.metrics},
                protocol="A",
                rows=rows,
                tokens=sum(map(len, seed.prompts)),
                cache_bytes=sum(found.row_bytes[mine]),
                cache_elements=sum(found.row_elements[mine]),
            )
        )
    return results
