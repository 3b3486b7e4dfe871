"""The samples of each suite in `samples.jsonl`, and the metrics that follow from them.

Suites compute the value of a seed with these functions, and reading a record computes it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from kvquant.study.percentiles import largest_needed, percentile
from kvquant.study.record_types import Strict

Rows = Sequence[dict[str, Any]]
KL_PERCENTILES = {"kl_p99": 990, "kl_p999": 999}  # metrics and their levels in thousandths
KL_ROUNDING = 1e-4  # nats per token by which float32 divergences may be off


class PerplexitySample(Strict):
    """Describes the loss of one window of text."""

    index: int = Field(ge=0)
    start: int = Field(ge=0, description="index of the first token in the text")
    tokens: int = Field(ge=1, description="number of scored tokens")
    nll: float = Field(ge=0, description="negative log likelihood of all scored tokens, nats")
    kl: float | None = Field(None, description="KL divergence from the unquantized cache, nats")
    kl_tail: list[float] | None = Field(
        None,
        description="divergences of this window's tokens that are among the seed's largest "
        "(`tail_size`), descending, nats",
    )
    top1_agreed: int | None = Field(
        None, ge=0, description="tokens with the most probable next token of the unquantized cache"
    )


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


class OwnPromptSample(AnsweredSample):
    """Describes an answer to one of the user's own prompts."""

    row: int = Field(ge=0, description="index of the prompt among those of the data set")
    references: list[str] = Field(
        description="accepted answers, or the unquantized cache's answer where agreement is scored"
    )
    agreed_tokens: int | None = Field(
        None, ge=0, description="tokens before the first difference from that answer"
    )
    compared_tokens: int | None = Field(
        None, ge=0, description="tokens of the longer one of both answers"
    )


@dataclass(frozen=True)
class Summary:
    """Holds the metrics that follow from samples and the tokens that went through the cache."""

    metrics: dict[str, float]
    tokens: int


def tail_size(tokens: int) -> int:
    """Returns how many of a seed's largest divergences its samples hold: about 1 %."""
    return largest_needed(tokens, min(KL_PERCENTILES.values()))


def perplexity_summary(rows: Rows) -> Summary:
    """Returns the perplexity and, where it was measured, the distance from the unquantized cache.

    The perplexity is exp of the mean negative log likelihood over scored tokens, `kl` the mean
    divergence of a token. `kl_p99` and `kl_p999` are percentiles over all scored tokens of all
    windows together, by linear interpolation (:func:`kvquant.study.percentiles.percentile`). They
    depend on the largest divergences alone, which the samples hold one by one as the shortest
    decimals of the measured float32 numbers: the percentiles are exact, and their resolution is
    that of float32 (6e-8 of the value). `top1_agreement` is the share of scored tokens with the
    unquantized cache's most probable next token; of equal logits the first token of the vocabulary
    counts, as in greedy decoding.

    Raises:
        ValueError: The samples hold fewer divergences than the percentiles depend on.
    """
    scored = sum(row["tokens"] for row in rows)
    mean = math.fsum(row["nll"] for row in rows) / scored
    window = max(row["tokens"] for row in rows) + 1  # the first token is not scored
    metrics = {"perplexity": math.exp(mean), "nll": mean, "window": float(window)}
    if _measured("kl", rows):
        metrics["kl"] = math.fsum(row["kl"] for row in rows) / scored
    if _measured("kl_tail", rows):
        tail = [value for row in rows for value in row["kl_tail"]]
        for name, per_mille in KL_PERCENTILES.items():
            metrics[name] = percentile(tail, per_mille, scored)
    if _measured("top1_agreed", rows):
        metrics["top1_agreement"] = sum(row["top1_agreed"] for row in rows) / scored
    return Summary(metrics, scored + len(rows))


def _measured(field: str, rows: Rows) -> bool:
    """Returns whether all samples have a field that may be absent."""
    return all(row.get(field) is not None for row in rows)


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


def agreed_share(row: Mapping[str, Any]) -> float:
    """Returns the share of an answer's tokens before its first difference; 1 if both are empty."""
    return row["agreed_tokens"] / row["compared_tokens"] if row["compared_tokens"] else 1.0


def own_prompts_summary(rows: Rows) -> Summary:
    """Returns the mean score in percent.

    Where agreement is scored, `identical_share` is the fraction of answers that are the unquantized
    cache's to the last token.
    """
    plain = score_summary("score")(rows)
    if not _measured("compared_tokens", rows):
        return plain
    same = sum(row["agreed_tokens"] == row["compared_tokens"] for row in rows)
    return Summary(plain.metrics | {"identical_share": same / len(rows)}, plain.tokens)


def check_own_prompts(metrics: Mapping[str, float], rows: Rows) -> None:
    """Checks that samples are different prompts that there are, and that agreement is the score.

    Raises:
        ValueError: A prompt is asked twice, there are fewer prompts, or a score contradicts the
            tokens that agree.
    """
    check_data_rows({"rows_available": metrics.get("prompts_available", math.inf)}, rows)
    for row in rows:
        if (row.get("agreed_tokens") is None) != (row.get("compared_tokens") is None):
            raise ValueError("field 'compared_tokens': goes with 'agreed_tokens'")
        if row.get("compared_tokens") is None:
            continue
        if row["agreed_tokens"] > row["compared_tokens"] or row["score"] != agreed_share(row):
            raise ValueError("field 'score': is not the share of tokens that agree")


def check_windows(metrics: Mapping[str, float], rows: Rows) -> None:
    """Checks windows of text against each other and against a record's metrics.

    Raises:
        ValueError: The record has a metric that its samples lack, a measurement is missing in some
            windows, the largest divergences contradict the sums, or windows overlap.
    """
    fields = {"kl": "kl", **dict.fromkeys(KL_PERCENTILES, "kl_tail")}
    for metric, field in (fields | {"top1_agreement": "top1_agreed"}).items():
        if metric in metrics and not _measured(field, rows):
            raise ValueError(f"field 'metrics.{metric}': the samples have none")
    for field in ("kl_tail", "top1_agreed"):
        if all(row.get(field) is None for row in rows):
            continue  # also where the seed was measured before there was this field
        for other in (field, "kl"):
            if not _measured(other, rows):
                raise ValueError(f"field '{field}': is there, but some samples have no '{other}'")
    if any((row.get("top1_agreed") or 0) > row["tokens"] for row in rows):
        raise ValueError("field 'top1_agreed': is more than the window's tokens")
    if _measured("kl_tail", rows):
        _check_tails(rows)
    ends = [row["start"] + row["tokens"] for row in rows]
    if any(row["start"] <= end for row, end in zip(rows[1:], ends, strict=False)):
        raise ValueError("windows overlap")


def _check_tails(rows: Rows) -> None:
    """Checks that the largest divergences are as many as they must be and agree with the sums."""
    held = sum(len(row["kl_tail"]) for row in rows)
    asked = tail_size(sum(row["tokens"] for row in rows))
    if held != asked:
        raise ValueError(f"field 'kl_tail': the samples hold {held} values, not {asked}")
    least = min(value for row in rows for value in row["kl_tail"])
    for row in rows:
        tail = row["kl_tail"]
        others = row["tokens"] - len(tail)
        if others < 0 or tail != sorted(tail, reverse=True):
            raise ValueError("field 'kl_tail': values do not descend, or exceed the tokens")
        # The window's other tokens have at most the least of the largest divergences each.
        total = math.fsum(tail)
        slack = KL_ROUNDING * (row["tokens"] + abs(total))
        if not total - slack <= row["kl"] <= total + others * least + slack:
            raise ValueError(f"field 'kl': is {row['kl']}, which the values of 'kl_tail' exclude")


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
