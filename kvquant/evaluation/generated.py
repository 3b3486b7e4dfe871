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
from kvquant.evaluation.chat import begins_in_thought, split_thought
from kvquant.models.generation import GenerationResult, Stop, greedy
from kvquant.runtime.progress import note
from kvquant.study.sample_types import Rows, Summary, agreed_share, score_summary


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
        agreement: Whether the score is the share of an answer's tokens that agree with the
            unquantized cache's answer (:func:`agreement`), in place of `score`.
        summary: The metrics that follow from samples; None: the mean score alone.
    """

    score: Callable[[Prompt, str], float]
    metric: str = "score"
    stop: Stop | None = None
    agreement: bool = False
    summary: Callable[[Rows], Summary] | None = None


class Answered(NamedTuple):
    """Holds the code of a suite with generated answers.

    Attributes:
        prepare: Returns the prompts of a seed from (source, task, seed), without a model.
        rules: Returns the scoring rules from (task, tokenizer).
    """

    prepare: Callable[[Source, Any, int], SeedPrompts]
    rules: Callable[[Any, Any], Rules]


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> dict[str, int]:
    """Returns how far an answer agrees with a reference, as fields of a sample.

    Args:
        tokens: The tokens of the answer.
        reference: Those of the unquantized cache's answer.

    Returns:
        `agreed_tokens`, those before the first difference, and `compared_tokens`, the length of the
        longer answer. An answer that ends earlier differs where it ends.
    """
    pairs = zip(tokens, reference, strict=False)
    agreed = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if agreed is None:
        agreed = min(len(tokens), len(reference))
    return {"agreed_tokens": agreed, "compared_tokens": max(len(tokens), len(reference))}


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
    twice = rules.agreement and context.qm.approximates
    passes = 2 if twice else 1

    def answer(unquantized: bool, before: int) -> GenerationResult:
        return greedy(
            context.qm,
            asked,
            seeds[0].max_new_tokens,
            batch_size=batch_size,
            batch_tokens=context.batch_tokens,
            stop=rules.stop,
            on_batch=lambda done: context.progress(before + done, passes * len(asked)),
            unquantized=unquantized,
        )

    found = answer(False, 0)
    references = answer(True, len(asked)).tokens if twice else found.tokens
    results, at = [], 0
    for seed in seeds:
        mine = slice(at, at + len(seed.prompts))
        at = mine.stop
        rows = []
        for index, (prompt, tokens, reference) in enumerate(
            zip(seed.prompts, found.tokens[mine], references[mine], strict=True)
        ):
            inside = begins_in_thought(context.qm.tokenizer, prompt.tokens)
            said = split_thought(context.qm.tokenizer, tokens, inside=inside)
            facts = {"index": index, "prompt_tokens": len(prompt.tokens), **prompt.record}
            rows.append({**facts, "answer": said.text})
            if rules.agreement:
                own = split_thought(context.qm.tokenizer, reference, inside=inside)
                rows[-1] |= {"references": [own.text], **agreement(tokens, reference)}
                rows[-1]["score"] = agreed_share(rows[-1])
            else:
                rows[-1]["score"] = rules.score(prompt, said.text)
            if said.thought is not None:
                rows[-1] |= {"thought": said.thought, "thought_finished": said.finished}
        summary = (rules.summary or score_summary(rules.metric))(rows)
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
