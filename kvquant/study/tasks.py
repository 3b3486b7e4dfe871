"""The suites with the options of their tasks, and the study's section `evaluation:`.

A suite is registered by the decorator :func:`kvquant.study.suite.suite` on the class of its tasks'
options, and is listed nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, model_validator

from kvquant.errors import unknown
from kvquant.study.datasets import DATASETS
from kvquant.study.limits import MAX_BATCH, MAX_SAMPLES, MAX_TOKENS, MAX_WINDOWS
from kvquant.study.margin import Margin
from kvquant.study.sample_types import (
    KL_PERCENTILES,
    LongBenchSample,
    OwnPromptSample,
    PasskeySample,
    PerplexitySample,
    RulerSample,
    check_data_rows,
    check_own_prompts,
    check_windows,
    longbench_summary,
    own_prompts_summary,
    perplexity_summary,
)
from kvquant.study.strict import Strict
from kvquant.study.suite import SUITES as SUITES
from kvquant.study.suite import AnsweredTask, Protocol, Task, count_of, suite
from kvquant.study.task_families import family_of, task_label, task_names
from kvquant.study.wording import Words

RULER_TASKS = task_names("ruler")
LONGBENCH_TASKS = task_names("longbench")


@suite(
    label="perplexity",
    implementation="kvquant.evaluation.perplexity:run_perplexity",
    metric="perplexity",
    metric_type="likelihood",
    higher_is_better=False,
    loss_axis="perplexity increase",
    margin=Margin(relative=0.01),
    sample=PerplexitySample,
    summary=perplexity_summary,
    check_samples=check_windows,
    table_metrics=("kl", *KL_PERCENTILES, "top1_agreement"),
    asks_prompts=False,
    caption="Perplexity: mean over seeds, change with its 95 % interval, KL divergence of the next "
    "token from the unquantized cache.",
    table="kvquant.analysis.suite_tables:likelihoods",
)
class PerplexityTask(Task):
    """Perplexity over non-overlapping windows, of which the seed moves the first one's offset."""

    suite: Literal["perplexity"] = Field(description="suite of the task")
    dataset: str = Field("wikitext2", description="data set whose test text is read")
    window: int = Field(
        2048,
        ge=0,
        le=MAX_TOKENS,
        description="tokens per window; 0 takes all positions of the model",
    )
    windows: int = Field(
        0, ge=0, le=MAX_WINDOWS, description="windows per seed; 0 takes the whole text"
    )
    protocol: Protocol = Field(
        "B",
        description="A: a chunk attends to itself in full precision; B: every token reads codes",
    )
    chunk: int = Field(256, ge=1, le=MAX_TOKENS, description="tokens per chunk (protocol A)")
    batch_size: int = Field(
        1, ge=1, le=MAX_BATCH, description="maximum number of windows per batch"
    )
    kl: bool = Field(
        True,
        description="whether the distance from the unquantized cache is measured as well: KL "
        "divergence and top-1 agreement",
    )

    bos: bool = Field(
        False,
        description="whether the model's BOS token takes the place of each window's first token, "
        "which is not scored either way; some models (Gemma) read text without it badly",
    )

    speed_options = frozenset({"minutes", "batch_size"})
    words: ClassVar[Words] = {
        "bos": lambda given: "after BOS" if given else "without BOS",
        "window": lambda n: f"windows of {n:,}" if n else "full windows",
        "windows": lambda n: f"{n:,} windows" if n else "whole text",
        "chunk": "chunks of {}".format,
        "kl": lambda measured: "with KL" if measured else "without KL",
    }

    def meaning(self, *without: str) -> dict[str, Any]:
        """Returns the options that results depend on; `bos` counts where it is chosen."""
        return super().meaning(*without, *([] if self.bos else ["bos"]))

    @model_validator(mode="after")
    def _window(self) -> PerplexityTask:
        if 0 < self.window < 32:
            raise ValueError("window: must be 0 (all positions of the model) or at least 32")
        return self

    def title(self, key: str) -> str:
        """Returns the data set and the protocol."""
        known = DATASETS.get(self.dataset)
        dataset = (known.label if known else "") or self.dataset
        return f"{dataset}, protocol {self.protocol}"

    def cache_protocol(self) -> Protocol:
        """Returns the protocol by which the cache is measured."""
        return self.protocol

    def dataset_name(self) -> str:
        """Returns the data set that the task reads."""
        return self.dataset

    def sample_count(self) -> int:
        """Returns the number of windows per seed; 0 stands for the whole text."""
        return self.windows

    def longest_call(self) -> tuple[str, int]:
        """Returns the option that says how many tokens a call has at most, and how many; 0: all."""
        if self.protocol == "A" and (not self.window or self.chunk < self.window):
            return "chunk", self.chunk
        return "window", self.window

    def describe(self) -> str:
        """Returns the number and the length of the windows, and the protocol."""
        size = f"of {self.window} tokens" if self.window else "of all the model's positions"
        return f"{count_of(self.windows, 'window')} {size}, protocol {self.protocol}"

    def check_metrics(self, metrics: Mapping[str, float]) -> None:
        """Checks that a record has the window and, exactly if asked for, the KL divergence.

        Raises:
            ValueError: The record was measured with other options; the message names the metric.
        """
        if ("kl" in metrics) != self.kl:
            raise ValueError(f"field 'metrics.kl': the study says kl: {str(self.kl).lower()}")
        if self.window and metrics.get("window") != self.window:
            raise ValueError(f"field 'metrics.window': the study's is {self.window}")


@suite(
    label="passkey",
    implementation="kvquant.evaluation.passkey:PASSKEY",
    metric="accuracy",
    margin=Margin(relative=0.05),
    sample=PasskeySample,
    caption="Passkey retrieval by prompt length.",
)
class PasskeyTask(AnsweredTask):
    """Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300) of keys drawn from the seed."""

    suite: Literal["passkey"] = Field(description="suite of the task")
    length: int = Field(1024, ge=128, le=MAX_TOKENS, description="tokens per prompt")
    samples: int = Field(
        10, ge=1, le=MAX_SAMPLES, description="prompts per seed, with evenly spread depths"
    )

    def title(self, key: str) -> str:
        """Returns the suite and the prompt length."""
        return f"passkey, {self.length:,} tokens"


class _FamilyTask(AnsweredTask):
    """A task of one of its suite's families (:mod:`kvquant.study.task_families`)."""

    if TYPE_CHECKING:  # fields that each subclass declares
        task: str
        max_new_tokens: int

    words: ClassVar[Words] = {"length": lambda n: f"{n:,} tokens"}

    def title(self, key: str) -> str:
        """Returns the suite and its own name of the task."""
        return f"{SUITES[self.suite].label} {task_label(self.suite, self.task)}"

    def dataset_name(self) -> str | None:
        """Returns the data set that the task reads."""
        family = family_of(self.suite, self.task)
        return None if family is None else family.tasks[self.task]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields a problem where the task is unknown or a length leaves no room."""
        family = family_of(self.suite, self.task)
        if family is None:
            yield "task", str(unknown(f"{self.suite} task", self.task, task_names(self.suite)))
        if self.max_new_tokens >= self.length:
            yield "max_new_tokens", "leaves no room for a prompt in `length`"
        if family is not None and self.length < family.min_length:
            yield "length", f"'{self.task}' needs at least {family.min_length} tokens"


@suite(
    label="RULER",
    implementation="kvquant.evaluation.ruler:RULER",
    metric="score",
    margin=Margin(relative=0.05, absolute=2.0),
    sample=RulerSample,
    uses_chat=True,
    caption="{suite}.",
)
class RulerTask(_FamilyTask):
    """A RULER task (arXiv 2404.06654), generated and scored by the pinned lm-eval package."""

    suite: Literal["ruler"] = Field(description="suite of the task")
    task: str = Field(description="niah_single_1, niah_single_2, niah_multikey_1, vt, ...")
    length: int = Field(
        4096, ge=256, le=MAX_TOKENS, description="tokens of prompt and answer together"
    )
    samples: int = Field(20, ge=1, le=MAX_SAMPLES, description="prompts per seed")
    max_new_tokens: int = Field(
        0,
        ge=0,
        le=MAX_TOKENS,
        description="maximum number of generated tokens; 0 takes RULER's own",
    )


@suite(
    label="LongBench",
    implementation="kvquant.evaluation.longbench:LONGBENCH",
    metric="score",
    margin=Margin(relative=0.05, absolute=2.0),
    sample=LongBenchSample,
    summary=longbench_summary,
    check_samples=check_data_rows,
    table_metrics=("rows_available", "rows_official"),
    uses_chat=True,
    caption="{suite}; in brackets the rows of each task.",
)
class LongBenchTask(_FamilyTask):
    """An English task of LongBench (arXiv 2308.14508), as the pinned lm-eval package defines it."""

    suite: Literal["longbench"] = Field(description="suite of the task")
    task: str = Field(description="qasper, hotpotqa, gov_report, triviaqa, lcc, ...")
    length: int = Field(
        8192,
        ge=256,
        le=MAX_TOKENS,
        description="tokens of prompt and answer together; longer prompts are cut in their middle",
    )
    samples: int = Field(
        0,
        ge=0,
        le=MAX_SAMPLES,
        description="rows that each seed draws; 0, or more than there are, takes all",
    )
    max_new_tokens: int = Field(
        0,
        ge=0,
        le=MAX_TOKENS,
        description="maximum number of generated tokens; 0 takes LongBench's own",
    )

    def samples_expected(self, metrics: Mapping[str, float]) -> int:
        """Returns the number of rows that a record must hold, at most as many as the data has."""
        available = int(metrics.get("rows_available", 0.0))
        return min(self.samples or available, available)


@suite(
    label="own prompts",
    implementation="kvquant.evaluation.own_prompts:OWN_PROMPTS",
    metric="score",
    margin=Margin(relative=0.05),
    sample=OwnPromptSample,
    summary=own_prompts_summary,
    check_samples=check_own_prompts,
    table_metrics=("identical_share",),
    uses_chat=True,
    caption="Own prompts by task: accepted answers, or agreement with the unquantized cache.",
)
class OwnPromptsTask(AnsweredTask):
    """Prompts of the user's own, from an entry of the study's `datasets`."""

    suite: Literal["prompts"] = Field(description="suite of the task")
    dataset: str = Field(
        description="entry of `datasets` with the prompts: JSON Lines with `prompt` and `answers`, "
        "a text or a list of texts, or without `answers`"
    )
    scoring: Literal["contains", "exact", "f1", "agreement"] = Field(
        "contains",
        description="contains: an accepted answer occurs in the answer; exact: it is the answer; "
        "f1: F1 of their words; agreement: share of the answer's tokens before the first "
        "difference from the unquantized cache's answer, which needs no `answers`",
    )
    length: int = Field(
        2048,
        ge=16,
        le=MAX_TOKENS,
        description="tokens of prompt and answer together; a longer prompt is refused",
    )
    samples: int = Field(
        0,
        ge=0,
        le=MAX_SAMPLES,
        description="prompts per seed, which take turns; 0, or more than there are, takes all",
    )
    max_new_tokens: int = Field(
        64, ge=1, le=MAX_TOKENS, description="maximum number of generated tokens"
    )
    chat: bool = Field(
        True,
        description="whether a prompt is a user's turn of the model's chat template, if there is "
        "one; otherwise it is plain text that the model continues",
    )

    own_prompts: ClassVar[bool] = True
    words: ClassVar[Words] = {
        "length": lambda n: f"{n:,} tokens",
        "samples": lambda n: f"{n:,} per seed" if n else "all prompts",
        "max_new_tokens": "{} new tokens".format,
        "chat": lambda chat: "chat template" if chat else "plain text",
    }

    def title(self, key: str) -> str:
        """Returns the data set and what is scored."""
        scored = {"contains": "answer contained", "exact": "exact answer", "f1": "token F1"}
        return f"{self.dataset}, {scored.get(self.scoring, self.scoring)}"

    def dataset_name(self) -> str:
        """Returns the data set that holds the prompts."""
        return self.dataset

    def describe(self) -> str:
        """Returns the number and the greatest length of the prompts."""
        return f"{count_of(self.samples, 'prompt')} of at most {self.length} tokens with answers"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields a problem where the length leaves no room for a prompt."""
        if self.max_new_tokens >= self.length:
            yield "max_new_tokens", "leaves no room for a prompt in `length`"

    def samples_expected(self, metrics: Mapping[str, float]) -> int:
        """Returns the number of prompts that a record must hold, at most as many as there are."""
        available = int(metrics.get("prompts_available", 0.0))
        return min(self.samples or available, available)

    def check_metrics(self, metrics: Mapping[str, float]) -> None:
        """Checks that a record has the share of identical answers exactly if agreement is scored.

        Raises:
            ValueError: The record was measured with other options; the message names the metric.
        """
        if ("identical_share" in metrics) != (self.scoring == "agreement"):
            raise ValueError(f"field 'metrics.identical_share': the study scores {self.scoring}")


# The tasks that a study may list are those of every suite registered above.
if TYPE_CHECKING:
    TaskSpec = Task
else:
    TaskSpec = Annotated[
        Union[tuple(suite.tasks for suite in SUITES.values())],  # noqa: UP007
        Field(discriminator="suite"),
    ]


class EvaluationSpec(Strict):
    """Which schemes are evaluated on which tasks, and how many tokens a batch may have."""

    schemes: list[str] = Field(default_factory=list, description="empty: all schemes of the study")
    tasks: dict[str, list[str]] = Field(
        default_factory=dict,
        description="tasks of single schemes; a scheme that is not named here runs all",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="maximum number of tokens per batch, padding included; absent: no limit",
    )
    tasks_per_job: Literal["one", "all"] = Field(
        "one",
        description="tasks of one scheme that a job evaluates; `all` starts one process and loads "
        "the model once per scheme, on a CPU",
    )
    later: ClassVar[tuple[str, ...]] = ("tasks_per_job",)
