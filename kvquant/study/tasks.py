"""The study's tasks and its section `evaluation:`; part of :mod:`kvquant.study.config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvquant.study.limits import MAX_BATCH, MAX_MINUTES, MAX_SAMPLES, MAX_TOKENS, MAX_WINDOWS
from kvquant.study.strict import Strict

# The tasks of the pinned lm-eval that the suites can run; tests hold these lists against it.
RULER_TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
LONGBENCH_TASKS = (
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
    *("gov_report", "qmsum", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_retrieval_en", "passage_count", "lcc", "repobench-p"),
)


TEXTS = (
    "essays",
    "wikitext2",
    "squad",
    "hotpotqa",
)  # of fetch.datasets, beside LongBench's
MIN_RULER_LENGTH = {"vt": 400}  # its shortest chain with instruction and answer


class PerplexityTask(Strict):
    """Perplexity over non-overlapping windows; the seed moves the first window's offset."""

    suite: Literal["perplexity"] = Field(description="suite of the task")
    dataset: str = Field("wikitext2", description="text that is read")
    window: int = Field(
        2048, ge=0, le=MAX_TOKENS, description="tokens; 0 takes all positions of the model"
    )
    windows: int = Field(
        0, ge=0, le=MAX_WINDOWS, description="windows per seed; 0 takes the whole text"
    )
    protocol: Literal["A", "B"] = Field(
        "B", description="A: a prompt attends in full precision; B: every token reads codes"
    )
    chunk: int = Field(256, ge=1, le=MAX_TOKENS, description="tokens per chunk (protocol A)")
    batch_size: int = Field(1, ge=1, le=MAX_BATCH, description="windows per batch at most")
    kl: bool = Field(True, description="also the KL divergence to the unquantized cache")
    minutes: int = Field(
        30, ge=1, le=MAX_MINUTES, description="expected run time of one seed on one GPU"
    )

    @model_validator(mode="after")
    def _window(self) -> PerplexityTask:
        if 0 < self.window < 32:
            raise ValueError("window: must be 0 (all positions of the model) or at least 32")
        return self


class PasskeyTask(Strict):
    """Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300); the seed draws key and place."""

    suite: Literal["passkey"] = Field(description="suite of the task")
    length: int = Field(1024, ge=128, le=MAX_TOKENS, description="prompt tokens")
    samples: int = Field(
        10, ge=1, le=MAX_SAMPLES, description="prompts per seed, their depths spread evenly"
    )
    batch_size: int = Field(4, ge=1, le=MAX_BATCH, description="prompts per batch at most")
    minutes: int = Field(
        30, ge=1, le=MAX_MINUTES, description="expected run time of one seed on one GPU"
    )


class RulerTask(Strict):
    """One RULER task (arXiv 2404.06654), generated and scored by the pinned lm-eval package."""

    suite: Literal["ruler"] = Field(description="suite of the task")
    task: str = Field(description="niah_single_1, niah_single_2, niah_multikey_1, vt, ...")
    length: int = Field(4096, ge=256, le=MAX_TOKENS, description="prompt plus answer tokens")
    samples: int = Field(20, ge=1, le=MAX_SAMPLES, description="prompts per seed")
    batch_size: int = Field(4, ge=1, le=MAX_BATCH, description="prompts per batch at most")
    max_new_tokens: int = Field(
        0, ge=0, le=MAX_TOKENS, description="0 keeps RULER's own generation length"
    )
    minutes: int = Field(
        30, ge=1, le=MAX_MINUTES, description="expected run time of one seed on one GPU"
    )


class LongBenchTask(Strict):
    """One English task of LongBench (arXiv 2308.14508), as in the pinned lm-eval package."""

    suite: Literal["longbench"] = Field(description="suite of the task")
    task: str = Field(description="qasper, hotpotqa, gov_report, triviaqa, lcc, ...")
    length: int = Field(
        8192,
        ge=256,
        le=MAX_TOKENS,
        description="prompt plus answer tokens; longer prompts lose their middle",
    )
    samples: int = Field(
        0,
        ge=0,
        le=MAX_SAMPLES,
        description="rows that each seed draws; 0, or more than all, takes all",
    )
    batch_size: int = Field(4, ge=1, le=MAX_BATCH, description="prompts per batch at most")
    max_new_tokens: int = Field(
        0, ge=0, le=MAX_TOKENS, description="0 keeps LongBench's own generation length"
    )
    minutes: int = Field(
        30, ge=1, le=MAX_MINUTES, description="expected run time of one seed on one GPU"
    )


TaskSpec = Annotated[
    PerplexityTask | PasskeyTask | RulerTask | LongBenchTask, Field(discriminator="suite")
]


def task_dataset(task: TaskSpec) -> str | None:
    """The data set a task reads, or None when it makes its own text."""
    if isinstance(task, PerplexityTask):
        return task.dataset
    if isinstance(task, LongBenchTask):
        return f"longbench-{task.task}"
    if isinstance(task, RulerTask):
        return {"qa_1": "squad", "qa_2": "hotpotqa"}.get(task.task, "essays")
    return None


class EvaluationSpec(Strict):
    """Which schemes are evaluated on the tasks, and how much of a GPU one job takes."""

    schemes: list[str] = Field(default_factory=list, description="empty: all schemes of the study")
    tasks: dict[str, list[str]] = Field(
        default_factory=dict,
        description="tasks of single schemes; a scheme that is not named here runs all",
    )
    batch_tokens: int | None = Field(
        None, ge=1, description="tokens of a batch at most, padding included; absent: no limit"
    )
