"""Reads and checks LongBench's rows, from its own files or lm-eval's copy on the hub."""

from __future__ import annotations

from typing import Any

from kvquant.errors import UserError, unknown
from kvquant.fetch.lm_eval_files import task_files
from kvquant.formats.files import parse_json
from kvquant.study.tasks import LONGBENCH_TASKS

PACKAGE = "lm_eval.tasks.longbench"
# Number of rows of the official data; fewer are reported as a subset.
OFFICIAL_ROWS = {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500}


def official_rows(name: str) -> int:
    """Returns the number of rows of a task's official data."""
    return OFFICIAL_ROWS.get(name, 200)


def task_definition(name: str) -> dict[str, Any]:
    """Returns the content of a task's file in lm-eval."""
    if name not in LONGBENCH_TASKS:
        raise unknown("LongBench task", name, LONGBENCH_TASKS)
    return next(r for r in task_files(PACKAGE) if r.get("task") == f"longbench_{name}")


def hub_source(name: str) -> tuple[str, str]:
    """Returns the hub repository and configuration of a task's data.

    Raises:
        UserError: The task is unknown; the message offers the nearest known ones.
    """
    raw = task_definition(name)
    return raw["dataset_path"], raw["dataset_name"]


def clean_row(raw: Any, where: str) -> dict[str, Any]:
    """Returns a checked row with only the fields that prompts and metrics use.

    The official files call the question `input`; lm-eval's copy on the hub calls it `question`.

    Raises:
        UserError: A field is missing or of another type; the message names the row and the field.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object, got {type(raw).__name__}")
    question = raw.get("question", raw.get("input"))
    fields = {
        "context": (raw.get("context"), str),
        "input": (question, str),
        "answers": (raw.get("answers"), list),
    }
    for field, (value, expected) in fields.items():
        if value is None:
            raise UserError(f"{where}: the field '{field}' is missing")
        if not isinstance(value, expected):
            raise UserError(f"{where}: the field '{field}' is not a {expected.__name__}")
    answers = raw["answers"]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: the field 'answers' must hold at least one text")
    return {
        "context": raw["context"],
        "question": question,
        "answers": answers,
        "all_classes": raw.get("all_classes"),
    }


def read_rows(text: str, where: str) -> list[dict[str, Any]]:
    """Returns the rows of a JSON Lines text.

    Raises:
        UserError: A line is not JSON or refused by :func:`clean_row`, or there is no row.
    """
    rows = []
    # Not splitlines(): it also splits at other characters, which texts contain.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            raw = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}, line {number}: not JSON ({error})") from None
        rows.append(clean_row(raw, f"{where}, line {number}"))
    if not rows:
        raise UserError(f"{where}: holds no rows")
    return rows
