"""What the suites of generated answers share: prompts of several seeds answered in shared batches.

A decode step costs a GPU about the same for ten prompts as for a hundred, so seeds go through the
model together as far as a task's batch size allows. Which seeds that are changes no answer; the
bytes of a batch are shared out by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvquant.errors import UserError
from kvquant.evaluation.base import Context, Source, SuiteResult
from kvquant.evaluation.chat import spoken
from kvquant.models.generation import Stop, greedy
from kvquant.runtime.progress import note
from kvquant.study.sample_types import score_summary


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its answer is held against; JSON types only.

    Attributes:
        tokens: Token ids.
        record: Goes into the sample's record.
        scoring: What only the score needs.
    """

    tokens: list[int]
    record: dict[str, Any]
    scoring: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedPrompts:
    """One seed of a task, ready to be answered.

    Attributes:
        prompts: Its prompts.
        max_new_tokens: Longest answer.
        metrics: Further metrics of the seed, known before anything is answered.
    """

    prompts: list[Prompt]
    max_new_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """How a task's answers are scored.

    Attributes:
        score: (prompt, answer) to the score, from 0 to 1.
        metric: Name of the mean score in percent.
        stop: True for an answer that needs no further token.
    """

    score: Callable[[Prompt, str], float]
    metric: str = "score"
    stop: Stop | None = None


class Answered(NamedTuple):
    """The code of a suite whose answers are generated.

    Attributes:
        prepare: (source, task, seed) to the seed's prompts; needs no model.
        rules: (task, tokenizer) to how answers are scored.
    """

    prepare: Callable[[Source, Any, int], SeedPrompts]
    rules: Callable[[Any, Any], Rules]


def answer_seeds(
    context: Context, seeds: Sequence[SeedPrompts], rules: Rules, batch_size: int
) -> list[SuiteResult]:
    """The results of seeds of one task, answered together.

    Raises:
        UserError: A seed has no prompts, or its answers no room.
        NonFinite: Logits that decide a token are NaN or infinite.
    """
    for seed in seeds:
        if not seed.prompts:
            raise UserError(f"tasks.{context.task}: a seed has no prompts, so there is no score")
        if seed.max_new_tokens < 1:
            raise UserError(f"tasks.{context.task}.max_new_tokens: answers need at least 1 token")
    asked = [prompt.tokens for seed in seeds for prompt in seed.prompts]
    found = greedy(
        context.qm,
        asked,
        seeds[0].max_new_tokens,
        batch_size=batch_size,
        batch_tokens=context.batch_tokens,
        stop=rules.stop,
        on_batch=lambda done: context.progress(done, len(asked)),
    )
    results, at = [], 0
    for seed in seeds:
        mine = slice(at, at + len(seed.prompts))
        at = mine.stop
        rows = []
        for index, (prompt, tokens) in enumerate(
            zip(seed.prompts, found.tokens[mine], strict=True)
        ):
            answer = spoken(context.qm.tokenizer, tokens)
            facts = {"index": index, "prompt_tokens": len(prompt.tokens), **prompt.record}
            rows.append({**facts, "answer": answer.text, "score": rules.score(prompt, answer.text)})
            if answer.thought is not None:
                rows[-1] |= {"thought": answer.thought, "thought_finished": answer.finished}
        summary = score_summary(rules.metric)(rows)
        if lost := summary.metrics.get("thought_unfinished_share"):
            note(
                f"{100 * lost:.0f} % of the answers are thoughts that did not end and count as "
                "empty: turn thinking off (models: thinking) or raise max_new_tokens"
            )
        results.append(
            SuiteResult(
                metric=rules.metric,
                higher_is_better=True,
                value=summary.metrics[rules.metric],
                metrics=summary.metrics | seed.metrics,
                protocol="A",
                rows=rows,
                tokens=summary.tokens,
                cache_bytes=sum(found.row_bytes[mine]),
                cache_elements=sum(found.row_elements[mine]),
            )
        )
    return results
