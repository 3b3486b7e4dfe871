"""Reads the YAML or JSON of a study strictly, and refuses other content in one line.

YAML lets a file give a key twice, refer to itself, or expand a hundred bytes into gigabytes. A
study needs none of that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kvquant.errors import UserError
from kvquant.formats.files import is_text, parse_json, read_text

MAX_CHARACTERS = 4_000_000
MAX_YAML_CHARACTERS = 500_000  # PyYAML takes seconds for so many
# YAML 1.1 reads 010 as 8 and 1:10 as 70.
_MISREAD = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
MAX_DEPTH = 20
MAX_VALUES = 200_000  # counted with every alias expanded


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses keys that are given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None:
                raise yaml.MarkedYAMLError(
                    problem="a key is no plain text", problem_mark=key.start_mark
                )
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"key '{name}' is given twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _check_size(text: str) -> None:
    """Refuses nesting and aliases that would fill memory, before any value is built."""
    sizes: dict[str, int] = {}
    total = 0
    open_: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"'*{event.anchor}' refers to itself or to nothing")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            total += 1
            if len(open_) > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            _check_scalar(event)
        if total > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, its aliases written out")


def _check_scalar(event: Any) -> None:
    """Refuses numbers that YAML reads as other numbers, and text that no file can hold."""
    text, line = event.value, event.start_mark.line + 1
    if event.implicit[0] and _MISREAD.fullmatch(text):
        raise ValueError(
            f"line {line}: '{text}' is a number of base 8 or 60 to YAML; write it in decimal, or "
            "text in quotes"
        )
    if not is_text(text):
        raise ValueError(f"line {line}: half of a surrogate pair; write the character itself")


def _where(error: yaml.YAMLError) -> str:
    """Returns the message of a YAML error in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)


def parse_mapping(text: str, where: str, *, json: bool = False) -> Any:
    """Parses the text of a study file.

    Args:
        text: The YAML or JSON.
        where: The name of the file in messages.
        json: Whether the text is JSON.

    Raises:
        UserError: The text cannot be a study; the message is one line.
    """
    limit = MAX_CHARACTERS if json else MAX_YAML_CHARACTERS
    if len(text) > limit:
        raise UserError(f"{where}: {len(text):,} characters; a study has at most {limit:,}")
    try:
        if json:
            return parse_json(text)
        _check_size(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_where(error)}") from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        kind = "JSON" if json else "YAML"
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: not valid {kind}: {what}") from None


def read_mapping(path: str | Path, field: str = "--study") -> Any:
    """Reads a study file, which is JSON if its name ends with `.json` and YAML otherwise.

    Raises:
        UserError: The file cannot be read, or :func:`parse_mapping` refuses it.
    """
    file = Path(path)
    text = read_text(file, field)
    return parse_mapping(text, str(file), json=file.suffix == ".json")
