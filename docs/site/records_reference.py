"""The reference of records, made from the types by which records are written and read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from kvquant.study import record_types, sample_types
from kvquant.study.record_types import Record

HEAD = """# Fields of records

Every finished job leaves a record: one JSON file below `results/STUDY`, or one line below
[`results/published`](published-records.md). [The results folder](results-folder.md) has the paths.
This page is made from the types by which records are written and read
(`kvquant/study/record_types.py`, `sample_types.py`); a record with another field, or with a
value of another type, is refused.
"""
TITLES = {
    "eval": "Accuracy: `eval/.../run.json`",
    "throughput": "Speed: `perf/.../repN.json`",
    "energy": "Energy: `energy/.../repN.json`",
    "append": "Appends: `append/.../repN.json`",
    "kernels": "Kernels: `kernels/.../CASE.json`",
    "jobs": "Whole jobs: `jobs/.../CASE.json`",
}


def _models(module: Any) -> list[type[BaseModel]]:
    """Returns the models that a module defines, in its order."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, BaseModel)
        and value.__module__ == module.__name__
        and value.model_fields
    ]


def _heading(model: type[BaseModel]) -> str:
    if issubclass(model, Record) and model is not Record:
        return TITLES[model.model_fields["kind"].default]
    return "Fields of every record" if model is Record else f"`{model.__name__}`"


def _type(annotation: Any) -> str:
    """Returns a type as readers see it."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if "[" in str(annotation):
        text = str(annotation)
    text = re.sub(r"(?:typing|kvquant\.[\w.]+)\.(\w+)", r"\1", text)
    text = re.sub(r"\bLiteral\[([^]]*)\]", lambda m: m[1].replace(", ", " or "), text)
    return text.replace(" | None", "").replace("|", "or").replace("'", '"')


def _fields(model: type[BaseModel]) -> Iterator[str]:
    inherited = Record.model_fields if issubclass(model, Record) and model is not Record else {}
    yield from ("| field | type | meaning |", "|---|---|---|")
    for name, field in model.model_fields.items():
        if name in inherited:
            continue
        absent = "null" if field.default is None else ""
        meaning = "; ".join(filter(None, (field.description, absent and f"may be {absent}")))
        yield f"| `{name}` | `{_type(field.annotation)}` | {meaning} |"


def page() -> str:
    """Returns the whole page."""
    lines = [HEAD]
    for model in _models(record_types):
        lines += ["", f"## {_heading(model)}", "", model.__doc__ or "", "", *_fields(model)]
    lines += ["", "## Samples: `samples.jsonl`", ""]
    lines.append("A line per sample of an evaluation, beside its record.")
    for model in _models(sample_types):
        lines += ["", f"### `{model.__name__}`", "", model.__doc__ or "", "", *_fields(model)]
    return "\n".join(lines) + "\n"
