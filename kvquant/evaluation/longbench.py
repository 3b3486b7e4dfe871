"""LongBench (arXiv 2308.14508): questions, summaries, examples and code over long real texts.

Greedy answers to the pinned lm-eval's prompts. As in the official runner, a prompt that is too long
keeps its first and its last half, and only then becomes a turn of the chat template, for the tasks
that have one.
"""

from __future__ import annotations

import random
from typing import Any

from kvquant.config import LongBenchTask
from kvquant.errors import UserError
from kvquant.evaluation.base import Context, SuiteResult, check_length, encode
from kvquant.evaluation.generated import Prepared, answer_seeds
from kvquant.evaluation.longbench_tasks import (
    LongBenchDefinition,
    definition,
    official_rows,
    read_rows,
    score_answer,
)

ATTEMPTS = 5


def choose(available: int, samples: int, seed: int) -> list[int]:
    """The rows of a seed, ascending; all of them where `samples` is 0 or not fewer."""
    if samples == 0 or samples >= available:
        return list(range(available))
    return sorted(random.Random(f"longbench {seed}").sample(range(available), samples))


def cut_middle(tokenizer: Any, text: str, limit: int) -> tuple[str, bool]:
    """A text without the middle of its tokens, and whether anything was cut.

    As the official runner: the first and the last `limit // 2` tokens, special ones included in the
    count and left out of the text.
    """
    tokens = encode(tokenizer, text, special=True)
    if len(tokens) <= limit:
        return text, False
    half = limit // 2
    ends = (tokens[:half], tokens[len(tokens) - half :])
    return "".join(str(tokenizer.decode(e, skip_special_tokens=True)) for e in ends), True


def as_tokens(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt; a tokenizer without a chat template gets it as plain text."""
    if not chat or not getattr(tokenizer, "chat_template", None):
        return encode(tokenizer, text, special=True)
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return encode(tokenizer, turn, special=False)


def fit_prompt(
    tokenizer: Any, task: LongBenchDefinition, row: dict[str, Any], limit: int
) -> tuple[list[int], bool]:
    """A row's prompt of at most `limit` tokens, chat template included, and whether it was cut.

    Raises:
        UserError: There is no room.
    """
    from lm_eval.utils import apply_template

    whole = apply_template(task.template, row)
    room = limit - len(as_tokens(tokenizer, "", task.chat))
    for _ in range(ATTEMPTS):
        if room < 2:
            break
        text, cut = cut_middle(tokenizer, whole, room)
        tokens = as_tokens(tokenizer, text, task.chat)
        if len(tokens) <= limit:
            return tokens, cut
        # Tokens at the seam may come out otherwise when the text is encoded again.
        room -= len(tokens) - limit
    raise UserError(f"length: too short for {task.name}: its prompt does not fit")


def prepare_longbench(context: Context, spec: LongBenchTask, seed: int) -> Prepared:
    """A seed's rows; an answer's score is lm-eval's metric, the best over the row's answers."""
    tokenizer = context.qm.tokenizer
    try:
        task = definition(spec.task)
        answer_room = spec.max_new_tokens or task.max_new_tokens
        check_length(context, spec.length, 0)
        rows = read_rows(context.text("all"), f"longbench-{spec.task}")
        if task.name == "trec" and not all(row["all_classes"] for row in rows):
            raise UserError("longbench-trec: the field 'all_classes' is missing")
        chosen = choose(len(rows), spec.samples, seed)
        fitted = [fit_prompt(tokenizer, task, rows[at], spec.length - answer_room) for at in chosen]
    except UserError as error:
        text = str(error)
        raise UserError(
            text if text.startswith("tasks.") else f"tasks.{context.task}: {text}"
        ) from None

    def second_line(tokens: list[int]) -> bool:
        return "\n" in str(tokenizer.decode(tokens, skip_special_tokens=True)).lstrip("\n")

    def score(index: int, answer: str) -> dict[str, Any]:
        row = rows[chosen[index]]
        return {
            "row": chosen[index],
            "cut": fitted[index][1],
            "references": row["answers"],
            "answer": answer,
            "score": score_answer(task, row, answer),
        }

    return Prepared(
        [prompt for prompt, _ in fitted],
        answer_room,
        spec.batch_size,
        score,
        # A further line is not looked at, so it is not generated either.
        stop=second_line if task.first_line else None,
        metrics={
            "rows_available": float(len(rows)),
            "rows_official": float(official_rows(task.name)),
            "subset": float(len(rows) < official_rows(task.name)),
            "cut_share": sum(cut for _, cut in fitted) / len(fitted),
        },
    )


def run_longbench(context: Context, spec: LongBenchTask, seed: int) -> SuiteResult:
    """The task's score in percent: the mean of lm-eval's metric over a seed's rows."""
    return answer_seeds(context, [prepare_longbench(context, spec, seed)])[0]
