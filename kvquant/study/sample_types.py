"""The samples of each suite in `samples.jsonl`, and the metrics that follow from them.

Suites compute the value of a seed with these functions, and reading a record computes it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from kvquant.study.record_types import Strict

Rows = Sequence[dict[str, Any]]


class PerplexitySample(Strict):
    """Describes the loss of one window of text."""

    index: int = Field(ge=0)
    start: int = Field(ge=0, description="index of the first token in the text")
    tokens: int = Field(ge=1, description="number of scored tokens")
    nll: float = Field(ge=0, description="negative log likelihood of all scored tokens, nats")
    kl: float | None = Field(None, description="KL divergence from the unquantized cache, nats")


class AnsweredSample(Strict):
    """Describes a prompt and its answer."""

    index: int = Field(ge=0)
    prompt_tokens: int = Field(ge=1)
    answer: str
    score: float = Field(ge=0, le=1)
    thought: str | None = Field(None, description="what the model wrote before the answer")
    thought_finished: bool | None = Field(None, description="if False, the answer is empty")


class PasskeySample(AnsweredSample):
    """Describes an answer to a passkey prompt: the key and its depth in the filler, 0 to 1."""

    key: int
    depth: float = Field(ge=0, le=1)


class RulerSample(AnsweredSample):
    """Describes an answer to a RULER prompt and the references that it should contain."""

    references: list[str]


class LongBenchSample(AnsweredSample):
    """Describes an answer to a row of LongBench's data."""

    row: int = Field(ge=0)
    cut: bool = Field(description="whether the prompt lost its middle")
    references: list[str]


@dataclass(frozen=True)
class Summary:
    """Holds the metrics that follow from samples and the tokens that went through the cache."""

    metrics: dict[str, float]
    tokens: int


def perplexity_summary(rows: Rows) -> Summary:
    """Returns the perplexity: exp of the mean negative log likelihood over scored tokens."""
    scored = sum(row["tokens"] for row in rows)
    mean = math.fsum(row["nll"] for row in rows) / scored
    window = max(row["tokens"] for row in rows) + 1  # the first token is not scored
    metrics = {"perplexity": math.exp(mean), "nll": mean, "window": float(window)}
    if all(row.get("kl") is not None for row in rows):
        metrics["kl"] = math.fsum(row["kl"] for row in rows) / scored
    return Summary(metrics, scored + len(rows))


def score_summary(metric: str) -> Callable[[Rows], Summary]:
    """Returns a function for the mean score in percent and, if there are any, thoughts."""

    def summary(rows: Rows) -> Summary:
        metrics = {metric: 100.0 * sum(row["score"] for row in rows) / len(rows)}
        if thoughts := [row["thought_finished"] for row in rows if row.get("thought") is not None]:
            metrics["thought_share"] = len(thoughts) / len(rows)
            metrics["thought_unfinished_share"] = thoughts.count(False) / len(rows)
        return Summary(metrics, sum(row["prompt_tokens"] for row in rows))

    return summary


def longbench_summary(rows: Rows) -> Summary:
    """Returns the mean score in percent and the fraction of prompts that were cut."""
    plain = score_summary("score")(rows)
    share = sum(row["cut"] for row in rows) / len(rows)
    return Summary(plain.metrics | {"cut_share": share}, plain.tokens)


def check_windows(metrics: Mapping[str, float], rows: Rows) -> None:
    """Checks windows of text against each other and against a record's metrics.

    Raises:
        ValueError: The record has a divergence that its samples lack, or windows overlap.
    """
    if "kl" in metrics and any(row.get("kl") is None for row in rows):
        raise ValueError("field 'metrics.kl': the samples have none")
    ends = [row["start"] + row["tokens"] for row in rows]
    if any(row["start"] <= end for row, end in zip(rows[1:], ends, strict=False)):
        raise ValueError("windows overlap")


def check_data_rows(metrics: Mapping[str, float], rows: Rows) -> None:
    """Checks that samples are different rows of the data, and rows that there are.

    Raises:
        ValueError: A row is given twice, or the data has fewer rows.
    """
    numbers = [row["row"] for row in rows]
    if len(set(numbers)) != len(numbers):
        raise ValueError("field 'row': a row of the data is given twice")
    available = metrics.get("rows_available", math.inf)
    if max(numbers) >= available:
        raise ValueError(f"field 'row': is {max(numbers)}, but there are {available:g} rows")
