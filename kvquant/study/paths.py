"""Checks the strings of a study that become parts of paths.

Rules quote paths. A path that a shell, a glob or Snakemake's wildcards would interpret is refused
all the same, because users paste printed commands and other programs (Slurm's scripts, LaTeX) read
the same paths.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
PATHVARS = ("results", "paper", "logs", "cache")
# Allowed in addition to letters and digits of any language.
PLAIN = set("_./ @+=:,-")


def plain_path(value: str) -> str:
    """Checks a relative or absolute folder of a study.

    Args:
        value: The text in the study.

    Returns:
        The same text.

    Raises:
        ValueError: The text is empty, or holds a character that shells or Snakemake act on.
    """
    if not value.strip() or value != value.strip():
        raise ValueError("must be a folder, without spaces at its ends")
    for character in value:
        if not (character.isalnum() or character in PLAIN):
            shown = character if character.isprintable() else unicodedata.name(character, "?")
            shown = shown if shown != "?" else f"U+{ord(character):04X}"
            raise ValueError(
                f"'{shown}' is not allowed in a path of the study: use letters, digits, spaces "
                f"and {' '.join(sorted(PLAIN - {' '}))}"
            )
    if value.startswith("-"):
        raise ValueError("must not start with '-', which commands read as an option")
    return value


def device_key(value: str) -> str:
    """Checks the name of the device, under which timed results are filed.

    Raises:
        ValueError: The name is not in kebab case.
    """
    if not NAME.fullmatch(value):
        raise ValueError(f"must be kebab case ({NAME.pattern}), like 'a100-sxm4-40gb', or 'auto'")
    return value


def known_pathvars(value: dict[str, str]) -> dict[str, str]:
    """Checks the names of the workflow's folders.

    Raises:
        ValueError: A name is unknown.
    """
    for name in value:
        if name not in PATHVARS:
            raise ValueError(f"unknown folder '{name}'; known: {', '.join(PATHVARS)}")
    return value


def one_spelling(value: str) -> str:
    """Returns a folder without a slash at its end, double slashes and `./`.

    Snakemake compares paths as texts, and other folders are named by adding to this one.
    """
    return str(PurePosixPath(value))


def null_or_path(value: object) -> object:
    """Takes the word null for null, because Snakemake's `--config` knows no other."""
    return None if value == "null" else value


PlainPath = Annotated[str, AfterValidator(plain_path)]
DeviceKey = Annotated[str, AfterValidator(device_key)]
MaybePath = Annotated[PlainPath | None, BeforeValidator(null_or_path)]
Folder = Annotated[PlainPath, AfterValidator(one_spelling)]
PathVars = Annotated[dict[str, Folder], AfterValidator(known_pathvars)]
