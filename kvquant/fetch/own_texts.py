"""Reads the user's own files as a data set: a text with a test part, or prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from kvquant.errors import UserError
from kvquant.fetch.prompt_rows import as_lines, check_prompts, demand_answers, read_prompt_file
from kvquant.fetch.text_overlap import fingerprints, shared_part
from kvquant.formats.files import expand_home, read_bytes
from kvquant.study.config import Study
from kvquant.study.own_texts import OwnText

BETWEEN = "\n\n"  # between two files of a text
NEAR = 2_000  # characters in which a line end is looked for, where the test part may begin


def own_files(own: OwnText, field: str) -> Iterator[tuple[str, str]]:
    """Yields name and text of each file, after checking that it is the one of its hash.

    Args:
        own: The data set.
        field: What messages call its files.

    Raises:
        UserError: A file is missing, empty, not UTF-8 or another than the study was read with.
    """
    for index, name in enumerate(own.files):
        raw = read_bytes(expand_home(name, field), field)
        if own.sha256 is not None and hashlib.sha256(raw).hexdigest() != own.sha256[index]:
            raise UserError(
                f"{field}: {name} was edited since this run began, or since the study was given "
                "its hash: start the run again, and what depends on it is measured again"
            )
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{field}: {name}: byte {error.start} is not UTF-8: save it as UTF-8 text"
            ) from None
        if not text.strip():
            raise UserError(f"{field}: {name} is empty")
        yield name, text


def split_at(text: str, test_share: float) -> int:
    """Returns the character where the test part of a text begins, behind a line or a word.

    Args:
        text: The text.
        test_share: Share of it that is test text, above 0; 1 gives 0.
    """
    if test_share >= 1:
        return 0
    goal = min(len(text) - 1, max(1, round(len(text) * (1 - test_share))))
    for mark in ("\n", " "):
        at = text.find(mark, goal, goal + NEAR) + 1
        if 0 < at < len(text):
            return at
    return goal


def own_text(field: str, own: OwnText) -> tuple[str, int]:
    """Returns the joined text of a data set and the character where its test part begins.

    Args:
        field: What messages call its files.
        own: Its files.

    Raises:
        UserError: A file cannot be read, or the two parts share passages.
    """
    text = BETWEEN.join(text for _, text in own_files(own, field))
    at = split_at(text, own.test_share)
    shared = shared_part(fingerprints(text[:at]), fingerprints(text[at:]))
    if shared > 0:
        raise UserError(
            f"{field}: {100 * shared:.0f} % of the test part (the last "
            f"{100 * own.test_share:g} %) stands in the part before it, too, which calibration "
            "reads: remove what is repeated, or calibrate on another data set (test_share: 1)"
        )
    return text, at


def own_prompts(field: str, own: OwnText, scored: dict[str, str]) -> str:
    """Returns the prompts of a data set as one text (:func:`~kvquant.fetch.prompt_rows.as_lines`).

    Args:
        field: What messages call its files.
        own: Its files.
        scored: The scoring of each task that asks the prompts.

    Raises:
        UserError: A file cannot be read, or a line is refused.
    """
    rows = [row for file, text in own_files(own, field) for row in read_prompt_file(text, file)]
    check_prompts(rows)
    for task, scoring in scored.items():
        demand_answers(rows, task, scoring)
    return as_lines(rows)


def read_own(study: Study, name: str) -> tuple[str, int, str]:
    """Returns text, start of the test part and origin of a study's own data set.

    Raises:
        UserError: A file cannot be read, or its content is refused.
    """
    own = study.datasets[name]
    field = f"datasets.{name}.files"
    origin = ", ".join(Path(file).name for file in own.files)
    if not study.holds_prompts(name):
        return *own_text(field, own), origin
    scored = {
        key: str(getattr(task, "scoring", "agreement"))
        for key, task in study.tasks.items()
        if task.own_prompts and task.dataset_name() == name
    }
    return own_prompts(field, own, scored), 0, origin
