"""LongBench (arXiv 2308.14508): questions, summaries, examples and code over long real texts.

The prompts are those of the pinned lm-eval, and the answers are greedy. As in the official runner,
the middle of a prompt that is too long is cut before the prompt becomes a turn of the chat
template, for the tasks that use one.
"""

from __future__ import annotations

import random
from typing import Any

from kvquant.errors import UserError
from kvquant.evaluation.base import Source, check_length, encode
from kvquant.evaluation.chat import DEFAULT_CHAT, Chat, has_template
from kvquant.evaluation.generated import Answered, Prompt, Rules, SeedPrompts
from kvquant.evaluation.longbench_tasks import (
    LongBenchDefinition,
    definition,
    score_answer,
)
from kvquant.fetch.longbench_rows import official_rows, read_rows
from kvquant.study.tasks import LongBenchTask

ATTEMPTS = 5


def choose(available: int, samples: int, seed: int) -> list[int]:
    """Returns the ascending rows of a seed: a random choice, or all if `samples` is 0 or larger."""
    if samples == 0 or samples >= available:
        return list(range(available))
    return sorted(random.Random(f"longbench {seed}").sample(range(available), samples))


def cut_middle(tokenizer: Any, text: str, limit: int) -> tuple[str, bool]:
    """Returns a text without the middle of its tokens, and whether anything was cut.

    As in the official runner, the first and the last `limit // 2` tokens are kept. Special tokens
    count, but are left out of the text.
    """
    tokens = encode(tokenizer, text, special=True)
    if len(tokens) <= limit:
        return text, False
    half = limit // 2
    ends = (tokens[:half], tokens[len(tokens) - half :])
    return "".join(str(tokenizer.decode(e, skip_special_tokens=True)) for e in ends), True


def as_tokens(tokenizer: Any, text: str, turn: bool, chat: Chat = DEFAULT_CHAT) -> list[int]:
    """Returns the token ids of a prompt, as plain text if the tokenizer has no chat template.

    Args:
        tokenizer: The model's tokenizer.
        text: The prompt.
        turn: Whether the prompt is a user's turn of the chat template.
        chat: Options of the template.
    """
    if not turn or not has_template(tokenizer):
        return encode(tokenizer, text, special=True)
    return encode(tokenizer, chat.turn(tokenizer, text), special=False)


def fit_prompt(
    tokenizer: Any,
    task: LongBenchDefinition,
    row: dict[str, Any],
    limit: int,
    chat: Chat = DEFAULT_CHAT,
) -> tuple[list[int], bool]:
    """Returns a row's prompt in at most `limit` tokens, with template, and whether it was cut.

    Raises:
        UserError: The prompt does not fit.
    """
    from lm_eval.utils import apply_template

    whole = apply_template(task.template, row)
    room = limit - len(as_tokens(tokenizer, "", task.chat, chat))
    for _ in range(ATTEMPTS):
        if room < 2:
            break
        text, cut = cut_middle(tokenizer, whole, room)
        tokens = as_tokens(tokenizer, text, task.chat, chat)
        if len(tokens) <= limit:
            return tokens, cut
        # Tokens at the cut may differ when the text is encoded again.
        room -= len(tokens) - limit
    raise UserError(f"length: too short for the prompt of {task.name}: give it a longer `length`")


def prepare_longbench(source: Source, spec: LongBenchTask, seed: int) -> SeedPrompts:
    """Returns the prompts of a seed's rows.

    Raises:
        UserError: The data is invalid, or the length does not fit the task or the model.
    """
    try:
        task = definition(spec.task)
        answer_room = spec.max_new_tokens or task.max_new_tokens
        check_length(source, spec.length, 0)
        rows = read_rows(source.text("all"), f"longbench-{spec.task}")
        if task.name == "trec" and not all(row["all_classes"] for row in rows):
            raise UserError("longbench-trec: the field 'all_classes' is missing")
        chosen = choose(len(rows), spec.samples, seed)
        limit = spec.length - answer_room
        fitted = [fit_prompt(source.tokenizer, task, rows[at], limit, source.chat) for at in chosen]
    except UserError as error:
        text = str(error)
        raise UserError(
            text if text.startswith("tasks.") else f"tasks.{source.task}: {text}"
        ) from None
    return SeedPrompts(
        [
            Prompt(
                tokens,
                {"row": at, "cut": cut, "references": rows[at]["answers"]},
                {"all_classes": rows[at]["all_classes"]},
            )
            for at, (tokens, cut) in zip(chosen, fitted, strict=True)
        ],
        answer_room,
        metrics={
            "rows_available": float(len(rows)),
            "rows_official": float(official_rows(task.name)),
            "subset": float(len(rows) < official_rows(task.name)),
            "cut_share": sum(cut for _, cut in fitted) / len(fitted),
        },
    )


def longbench_rules(spec: LongBenchTask, tokenizer: Any) -> Rules:
    """Returns rules that score an answer by lm-eval's metric, the best over the row's answers."""
    task = definition(spec.task)

    def second_line(tokens: list[int]) -> bool:
        return "\n" in str(tokenizer.decode(tokens, skip_special_tokens=True)).lstrip("\n")

    def score(prompt: Prompt, answer: str) -> float:
        return score_answer(
            task, {"answers": prompt.record["references"], **prompt.scoring}, answer
        )

    # Further lines are not scored, so they are not generated.
    return Rules(score, stop=second_line if task.first_line else None)


LONGBENCH = Answered(prepare_longbench, longbench_rules)
