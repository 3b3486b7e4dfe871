"""RULER (arXiv 2404.06654): retrieval, tracking and aggregation over long synthetic prompts.

As in RULER's reference, the question is a user's turn in the model's chat template, and the
answer's prefix follows the opening of the assistant's turn. A model without a template gets
question and prefix as plain text.
"""

from __future__ import annotations

from typing import Any

from kvquant.errors import UserError
from kvquant.evaluation.base import Source, check_length, encode
from kvquant.evaluation.chat import DEFAULT_CHAT, Chat, has_template
from kvquant.evaluation.generated import Answered, Prompt, Rules, SeedPrompts
from kvquant.evaluation.ruler_tasks import (
    RulerDefinition,
    RulerSample,
    definition,
    make_samples,
    score_answer,
)
from kvquant.study.tasks import RulerTask

PREFIX_ROOM = 48  # tokens reserved for the answer's prefix, which is known only with the sample
ATTEMPTS = 5


def prompt_text(tokenizer: Any, sample: RulerSample, chat: Chat = DEFAULT_CHAT) -> tuple[str, bool]:
    """Returns the prompt and whether the tokenizer must still add its special tokens."""
    if not has_template(tokenizer):
        return f"{sample.question} {sample.prefix}", True
    return chat.turn(tokenizer, sample.question) + sample.prefix, False


def _fitting(
    source: Source, spec: RulerTask, task: RulerDefinition, seed: int
) -> tuple[list[RulerSample], list[list[int]]]:
    """Returns a seed's samples and prompts, which fit the task's length with their answers.

    lm-eval does not count the chat template, the answer's prefix and cwe's worked example, so room
    is reserved for them. If it is too small, the samples are made again with the missing tokens.
    """
    tokenizer = source.tokenizer
    empty, special = prompt_text(tokenizer, RulerSample("", "", []), source.chat)
    overhead = len(encode(tokenizer, empty, special=special)) + PREFIX_ROOM
    for _ in range(ATTEMPTS):
        samples = make_samples(
            task,
            lambda text: len(encode(tokenizer, text, special=False)),
            length=spec.length,
            overhead=overhead,
            samples=spec.samples,
            seed=seed,
            text=lambda: source.text("all"),
        )
        prompts = []
        for sample in samples:
            text, special = prompt_text(tokenizer, sample, source.chat)
            prompts.append(encode(tokenizer, text, special=special))
        excess = max(map(len, prompts)) + task.max_new_tokens - spec.length
        if excess <= 0:
            return samples, prompts
        overhead += excess
    raise UserError(
        f"length: {spec.length} tokens are too few for {task.name}: its prompts exceed it by "
        f"{excess} tokens after {ATTEMPTS} attempts: give it a longer `length`"
    )


def prepare_ruler(source: Source, spec: RulerTask, seed: int) -> SeedPrompts:
    """Returns the prompts of a seed.

    Raises:
        UserError: The task is unknown, or the length does not fit the task or the model.
    """
    try:
        task = definition(spec.task)
    except UserError as error:
        raise UserError(f"tasks.{source.task}.task: {error}") from None
    # The length includes the answer, so it alone must fit the positions.
    check_length(source, spec.length, max(0, spec.max_new_tokens - task.max_new_tokens))
    try:
        samples, prompts = _fitting(source, spec, task, seed)
    except UserError as error:
        raise UserError(f"tasks.{source.task}.{error}") from None
    return SeedPrompts(
        [
            Prompt(tokens, {"references": sample.references})
            for sample, tokens in zip(samples, prompts, strict=True)
        ],
        spec.max_new_tokens or task.max_new_tokens,
    )


def ruler_rules(spec: RulerTask, tokenizer: Any) -> Rules:
    """Returns rules that score an answer by the fraction of the references found in it."""
    task = definition(spec.task)
    return Rules(lambda prompt, answer: score_answer(task, prompt.record["references"], answer))


RULER = Answered(prepare_ruler, ruler_rules)
