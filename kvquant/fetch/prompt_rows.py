"""Reads and checks the user's own prompts, JSON Lines with `prompt` and, mostly, `answers`.

A refused line is named by its file and number. As a data set the rows keep both, so that later
messages can name them, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvquant.errors import UserError
from kvquant.formats.files import is_text, parse_json

FIELDS = ("prompt", "answers")


@dataclass(frozen=True)
class PromptRow:
    """Holds a prompt of the user's.

    Attributes:
        prompt: The text of the prompt.
        answers: Accepted answers; empty where there are none.
        file: The file that it stands in.
        line: Its line there, from 1.
    """

    prompt: str
    answers: tuple[str, ...]
    file: str
    line: int

    @property
    def where(self) -> str:
        """The file and the line, for messages."""
        return f"{self.file}, line {self.line}"


def _row(raw: Any, file: str, line: int) -> PromptRow:
    where = f"{file}, line {line}"
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object such as {{'prompt': '...'}}")
    for name in raw:
        if name not in FIELDS:
            raise UserError(f"{where}: unknown field '{name}'; known: {', '.join(FIELDS)}")
    prompt, answers = raw.get("prompt"), raw.get("answers", [])
    if not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt):
        raise UserError(f"{where}: the field 'prompt' must be a text that is not empty")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(
        isinstance(answer, str) and answer.strip() and is_text(answer) for answer in answers
    ):
        raise UserError(f"{where}: the field 'answers' must be a text, or a list of texts")
    return PromptRow(prompt, tuple(answers), file, line)


def read_prompt_file(text: str, file: str) -> list[PromptRow]:
    """Returns the rows of a file of prompts; blank lines are skipped.

    Args:
        text: The file's content.
        file: The file's name, for messages.

    Raises:
        UserError: A line is not JSON or not a prompt, or there is none.
    """
    rows = []
    # Not splitlines(): it also splits at other characters, which texts contain.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            raw = parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not JSON ({error})") from None
        rows.append(_row(raw, file, number))
    if not rows:
        raise UserError(f"{file}: holds no prompts")
    return rows


def check_prompts(rows: Sequence[PromptRow]) -> None:
    """Checks that prompts differ, and that all of them have answers or none has.

    Raises:
        UserError: They do not; the message names two lines.
    """
    first = rows[0]
    seen: dict[str, PromptRow] = {}
    for row in rows:
        if bool(row.answers) != bool(first.answers):
            without, given = (first, row) if row.answers else (row, first)
            raise UserError(
                f"{without.where}: has no 'answers', but {given.where} has: all prompts of a task "
                "are scored alike, so put those without answers into a file of their own"
            )
        if row.prompt in seen:
            raise UserError(f"{row.where}: is the prompt of {seen[row.prompt].where}, too")
        seen[row.prompt] = row


def demand_answers(rows: Sequence[PromptRow], task: str, scoring: str) -> None:
    """Refuses prompts without answers for a task that scores answers.

    Raises:
        UserError: There are no answers; the message names the task and the line.
    """
    if scoring != "agreement" and not rows[0].answers:
        raise UserError(
            f"tasks.{task}.scoring: '{scoring}' needs accepted answers, but {rows[0].where} has "
            "none: add 'answers' there, or write scoring: agreement"
        )


def as_lines(rows: Iterable[PromptRow]) -> str:
    """Returns rows as the text of a data set, one JSON object per line."""
    return "".join(
        json.dumps(
            {"prompt": r.prompt, "answers": r.answers, "file": r.file, "line": r.line},
            ensure_ascii=False,
        )
        + "\n"
        for r in rows
    )


def from_lines(text: str, where: str) -> list[PromptRow]:
    """Returns the rows of :func:`as_lines`.

    Args:
        text: The text of a data set.
        where: What messages call it.

    Raises:
        UserError: The text is of another kind.
    """
    rows = []
    try:
        for line in filter(None, text.split("\n")):
            raw = parse_json(line)
            rows.append(PromptRow(raw["prompt"], tuple(raw["answers"]), raw["file"], raw["line"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: holds no prompts of `kvquant fetch-data`") from None
    return rows
