"""Reads `samples.jsonl` and checks a record against it, without torch.

Suites compute the value of a seed with the same functions as this check, so that a record that
contradicts its samples is refused.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from kvquant.errors import UserError, printable
from kvquant.formats.files import parse_json, sha256_text
from kvquant.study.record_types import EvalRecord
from kvquant.study.sample_types import Rows
from kvquant.study.tasks import SUITES

TOLERANCE = 1e-9  # relative, because libraries on other machines round exp differently


def parse_samples(text: str, suite: str) -> list[dict[str, Any]]:
    """Returns the rows of a `samples.jsonl`.

    Raises:
        ValueError: A line is not a sample of the suite, or indices are not 0, 1, 2, ...; the
            message names the line.
    """
    rules = SUITES.get(suite)
    rows: list[dict[str, Any]] = []
    if rules is None:
        raise ValueError(f"field 'suite': '{suite}' is none of {', '.join(SUITES)}")
    # Not splitlines(), which also splits at U+2028 inside an answer.
    for number, line in enumerate(filter(None, text.split("\n")), start=1):
        try:
            row = parse_json(line)
            rules.sample.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(p) for p in first["loc"]) or "sample"
            raise ValueError(f"line {number}: field '{field}': {first['msg']}") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if row["index"] != number - 1:
            raise ValueError(f"line {number}: field 'index': is {row['index']}, not {number - 1}")
        rows.append(row)
    if not rows:
        raise ValueError("holds no samples")
    return rows


def _same(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=1e-12)


def check_against_samples(record: EvalRecord, rows: Rows) -> None:
    """Checks the fields of a record that follow from its samples.

    Raises:
        ValueError: A field contradicts the samples; the message names it.
    """
    rules = SUITES[record.suite]
    summary = rules.summary(rows)
    expected: dict[str, tuple[Any, Any]] = {
        "metric": (record.metric, rules.metric),
        "higher_is_better": (record.higher_is_better, rules.higher_is_better),
        "samples": (record.samples, len(rows)),
        "tokens": (record.tokens, summary.tokens),
    }
    for name, (found, right) in expected.items():
        if found != right:
            raise ValueError(f"field '{name}': is {found!r}, but its samples give {right!r}")
    for name, right in summary.metrics.items():
        held = record.metrics.get(name)
        if held is None or not _same(held, right):
            raise ValueError(
                f"field 'metrics.{name}': is {held}, but its samples give {right:.10g}"
            )
    if not _same(record.value, summary.metrics[rules.metric]):
        right = summary.metrics[rules.metric]
        raise ValueError(f"field 'value': is {record.value}, but its samples give {right:.10g}")
    if rules.check_samples is not None:
        rules.check_samples(record.metrics, rows)


def verified_samples(
    record: EvalRecord, text: str, where: object, again: str
) -> list[dict[str, Any]]:
    """Returns the samples of a record after checking that they belong to it.

    Args:
        record: A record whose seal was checked.
        text: Content of `samples.jsonl`.
        where: Path of the samples, for messages.
        again: How the user measures them again, for messages.

    Raises:
        UserError: The samples are not those of the record, not of its suite, or contradict it.
    """
    if sha256_text(text) != record.samples_sha256:
        raise UserError(
            f"{where}: missing, truncated or changed (sha256 differs from the record's): {again}"
        )
    try:
        rows = parse_samples(text, record.suite)
        check_against_samples(record, rows)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: {printable(error)}: {again}") from None
    return rows
