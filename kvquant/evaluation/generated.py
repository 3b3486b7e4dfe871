"""Common code of suites with generated answers: prompts of several seeds share batches.

A decode step takes a GPU about the same time for ten prompts as for a hundred, so seeds go through
the model together as far as a task's batch size allows. The grouping of seeds changes no answer,
and the bytes of a batch are divided among its prompts by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvquant.errors import UserError
from kvquant.evaluation.base import Context, Source, SuiteResult
from kvquant.evaluation.chat import split_thought
from kvquant.models.generation import Stop, greedy
from kvquant.runtime.progress import note
from kvquant.study.sample_types import score_summary


@dataclass(frozen=True)
class Prompt:
    """Holds a prompt and the data that its answer is scored with, of JSON types only.

    Attributes:
        tokens: Token ids of the prompt.
        record: Fields that go into the sample's record.
        scoring: Fields that only the score needs.
    """

    tokens: list[int]
    record: dict[str, Any]
    scoring: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedPrompts:
    """Holds the prompts of one seed of a task.

    Attributes:
        prompts: The prompts.
        max_new_tokens: Length of the longest answer in tokens.
        metrics: Further metrics of the seed, which do not depend on the answers.
    """

    prompts: list[Prompt]
    max_new_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """Holds the rules by which a task's answers are scored.

    Attributes:
        score: Returns the score of an answer to a prompt, from 0 to 1.
        metric: Name of the mean score in percent.
        stop: Returns True for an answer (its tokens so far) that needs no further token.
    """

    score: Callable[[Prompt, str], float]
    metric: str = "score"
    stop: Stop | None = None


class Answered(NamedTuple):
    """Holds the code of a suite with generated answers.

    Attributes:
        prepare: Returns the prompts of a seed from (source, task, seed), without a model.
        rules: Returns the scoring rules from (task, tokenizer).
    """

    prepare: Callable[[Source, Any, int], SeedPrompts]
    rules: Callable[[Any, Any], Rules]


def answer_seeds(
    context: Context, seeds: Sequence[SeedPrompts], rules: Rules, batch_size: int
) -> list[SuiteResult]:
    """Answers the prompts of several seeds of a task together and returns the results by seed.

    Raises:
        UserError: A seed has no prompts, or its answers may have no tokens.
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
            answer = split_thought(context.qm.tokenizer, tokens)
            facts = {"index": index, "prompt_tokens": len(prompt.tokens), **prompt.record}
            rows.append({**facts, "answer": answer.text, "score": rules.score(prompt, answer.text)})
            if answer.thought is not None:
                rows[-1] |= {"thought": answer.thought, "thought_finished": answer.finished}
        summary = score_summary(rules.metric)(rows)
        if lost := summary.metrics.get("thought_unfinished_share"):
            note(
                f"{100 * lost:.0f} % of the answers are unfinished thoughts and count as "
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
