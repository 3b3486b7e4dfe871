"""A suite's samples as `samples.jsonl` has them, and what follows from them (torch-free, cheap).

The suites compute a seed's value with the same functions by which it is recomputed wherever a
record is read; so a record says what its samples give, or it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from kvquant.errors import UserError, printable
from kvquant.formats.files import parse_json, sha256_text
from kvquant.study.record_types import EvalRecord, Strict

TOLERANCE = 1e-9  # relative: libraries of other machines round exp otherwise


class PerplexitySample(Strict):
    """A window of text."""

    index: int = Field(ge=0)
    start: int = Field(ge=0, description="first token in the text")
    tokens: int = Field(ge=1, description="scored ones")
    nll: float = Field(ge=0, description="negative log likelihood of all scored tokens, nats")
    kl: float | None = Field(None, description="divergence from the unquantized cache, the same")


class AnsweredSample(Strict):
    """A prompt and its answer."""

    index: int = Field(ge=0)
    prompt_tokens: int = Field(ge=1)
    answer: str
    score: float = Field(ge=0, le=1)
    thought: str | None = Field(None, description="what the model wrote before the answer")
    thought_finished: bool | None = Field(None, description="else the answer is empty")


class PasskeySample(AnsweredSample):
    """A hidden number and where it was, as a share of the filler."""

    key: int
    depth: float = Field(ge=0, le=1)


class RulerSample(AnsweredSample):
    """What should be found in the answer."""

    references: list[str]


class LongBenchSample(AnsweredSample):
    """A row of the data."""

    row: int = Field(ge=0)
    cut: bool = Field(description="whether the prompt lost its middle")
    references: list[str]


@dataclass(frozen=True)
class Summary:
    """What samples give: the metrics that follow from them, and tokens through the cache."""

    metrics: dict[str, float]
    tokens: int


def perplexity_summary(rows: Sequence[dict[str, Any]]) -> Summary:
    """Perplexity: exp of the mean negative log likelihood over all scored tokens."""
    scored = sum(row["tokens"] for row in rows)
    mean = math.fsum(row["nll"] for row in rows) / scored
    window = max(row["tokens"] for row in rows) + 1  # the first token is not scored
    metrics = {"perplexity": math.exp(mean), "nll": mean, "window": float(window)}
    if all(row.get("kl") is not None for row in rows):
        metrics["kl"] = math.fsum(row["kl"] for row in rows) / scored
    return Summary(metrics, scored + len(rows))


def score_summary(metric: str) -> Callable[[Sequence[dict[str, Any]]], Summary]:
    """The mean score in percent, under a name, and shares of thoughts where there is any."""

    def summary(rows: Sequence[dict[str, Any]]) -> Summary:
        metrics = {metric: 100.0 * sum(row["score"] for row in rows) / len(rows)}
        if thoughts := [row["thought_finished"] for row in rows if row.get("thought") is not None]:
            metrics["thought_share"] = len(thoughts) / len(rows)
            metrics["thought_unfinished_share"] = thoughts.count(False) / len(rows)
        return Summary(metrics, sum(row["prompt_tokens"] for row in rows))

    return summary


def longbench_summary(rows: Sequence[dict[str, Any]]) -> Summary:
    """The mean score in percent, and the share of prompts that were cut."""
    plain = score_summary("score")(rows)
    share = sum(row["cut"] for row in rows) / len(rows)
    return Summary(plain.metrics | {"cut_share": share}, plain.tokens)


class SampleRules(NamedTuple):
    """A suite's samples: their fields, the metric that statistics use, what they give."""

    sample: type[Strict]
    metric: str
    higher_is_better: bool
    summary: Callable[[Sequence[dict[str, Any]]], Summary]


SAMPLES: dict[str, SampleRules] = {
    "perplexity": SampleRules(PerplexitySample, "perplexity", False, perplexity_summary),
    "passkey": SampleRules(PasskeySample, "accuracy", True, score_summary("accuracy")),
    "ruler": SampleRules(RulerSample, "score", True, score_summary("score")),
    "longbench": SampleRules(LongBenchSample, "score", True, longbench_summary),
}


def parse_samples(text: str, suite: str) -> list[dict[str, Any]]:
    """The rows of a `samples.jsonl`.

    Raises:
        ValueError: A line is not a sample of the suite, or samples do not count 0, 1, 2, ...; the
            message names the line.
    """
    rules, rows = SAMPLES.get(suite), []
    if rules is None:
        raise ValueError(f"field 'suite': '{suite}' is none of {', '.join(SAMPLES)}")
    # not splitlines(), which also cuts at U+2028 inside an answer
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


def check_against_samples(record: EvalRecord, rows: Sequence[dict[str, Any]]) -> None:
    """Recomputes what a record says of its samples.

    Raises:
        ValueError: It says something else; the message names the field.
    """
    rules = SAMPLES[record.suite]
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
    if record.suite == "perplexity":
        if ("kl" in record.metrics) != ("kl" in summary.metrics):
            raise ValueError("field 'metrics.kl': its samples have none")
        ends = [row["start"] + row["tokens"] for row in rows]
        if any(row["start"] <= end for row, end in zip(rows[1:], ends, strict=False)):
            raise ValueError("windows overlap")
    if record.suite == "longbench":
        numbers = [row["row"] for row in rows]
        if len(set(numbers)) != len(numbers):
            raise ValueError("field 'row': a row of the data stands twice")
        held = record.metrics.get("rows_available", math.inf)
        if max(numbers) >= held:
            raise ValueError(f"field 'row': is {max(numbers)}, but there are {held:g} rows")


def verified_samples(
    record: EvalRecord, text: str, where: object, again: str
) -> list[dict[str, Any]]:
    """The samples of a record, which must be those that it was written with.

    Args:
        record: A record whose seal was checked.
        text: Of `samples.jsonl`.
        where: The samples' file, for messages.
        again: How to get them measured again, for messages.

    Raises:
        UserError: They are others, are not samples of the suite, or do not give what the record
            says.
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
