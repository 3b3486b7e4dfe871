"""Registers suites of tasks, with their options, implementation, metric and captions.

A suite is registered where the options of its tasks are defined (:mod:`kvquant.study.tasks`), with
the decorator :func:`suite`. Digests, prompts, statistics, tables, figures and the JSON schema of a
study read the registration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field

from kvquant.study.limits import MAX_BATCH, MAX_MINUTES
from kvquant.study.margin import Margin
from kvquant.study.registrations import only_value, register
from kvquant.study.sample_types import AnsweredSample, Rows, Summary, score_summary
from kvquant.study.wording import Named

Protocol = Literal["A", "B"]
MetricType = Literal["likelihood", "score"]


def count_of(number: int, noun: str) -> str:
    """Returns a count with its noun, where 0 stands for all."""
    return f"{number or 'all'} {noun}{'' if number == 1 else 's'}"


class Task(Named):
    """The options of tasks of every suite, and the methods that the workflow calls."""

    if TYPE_CHECKING:  # fields that each subclass declares, in the order of its options
        suite: str
        batch_size: int
    minutes: int = Field(
        30, ge=1, le=MAX_MINUTES, description="expected run time per seed on one GPU, in minutes"
    )

    # Whether the data set holds prompts of the user's, one per line, instead of a text.
    own_prompts: ClassVar[bool] = False
    # Options that change no result and are therefore not part of a result's digest.
    speed_options: ClassVar[frozenset[str]] = frozenset({"minutes"})

    def cache_protocol(self) -> Protocol:
        """Returns the protocol by which the cache is measured."""
        return "A"

    def dataset_name(self) -> str | None:
        """Returns the data set that the task reads; None for a task that makes its own text."""
        return None

    def sample_count(self) -> int:
        """Returns the number of samples per seed; 0 stands for all that the data has."""
        raise NotImplementedError

    def samples_expected(self, metrics: Mapping[str, float]) -> int:
        """Returns the number of samples that a record must hold; 0 stands for any number."""
        return self.sample_count()

    def describe(self) -> str:
        """Returns the size of the task in a few words."""
        raise NotImplementedError

    def title(self, key: str) -> str:
        """Returns the suite, and what the task's own name adds to it."""
        own = key.removeprefix(f"{self.suite}-").replace("-", " ")
        return f"{SUITES[self.suite].label} {own}"

    def telling(self) -> list[str]:
        """Returns the options that may tell tasks of one title apart."""
        told = {"suite", *self.speed_options}
        return [option for option in super().telling() if option not in told]

    def column(self, label: str) -> str:
        """Returns the head of the task's column in a table of its suite.

        Args:
            label: The task's name among those of the study.
        """
        return label.removeprefix(SUITES[self.suite].label).lstrip(" ,") or label

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields (option, problem) for every option that is wrong beyond what pydantic checks."""
        return iter(())

    def check_metrics(self, metrics: Mapping[str, float]) -> None:
        """Checks a record's metrics against the task's options.

        Raises:
            ValueError: The record was measured with other options; the message names the metric.
        """


class AnsweredTask(Task):
    """A task whose samples are prompts with generated answers."""

    if TYPE_CHECKING:  # as above
        length: int
        samples: int
    batch_size: int = Field(
        4, ge=1, le=MAX_BATCH, description="maximum number of prompts per batch"
    )

    def sample_count(self) -> int:
        """Returns the number of prompts per seed; 0 stands for all that the data has."""
        return self.samples

    def describe(self) -> str:
        """Returns the number and the length of the prompts."""
        return f"{count_of(self.samples, 'sample')} of {self.length} tokens"


@dataclass(frozen=True)
class Suite:
    """A suite of tasks that are measured by the same code and scored by the same metric.

    Attributes:
        name: The value of the option `suite` of its tasks.
        label: The name in text and tables.
        tasks: The options of its tasks.
        implementation: The name of the code ("module:attribute"). It is a
            :class:`kvquant.evaluation.generated.Answered` where answers are generated, else a
            function of (context, task, seed) that returns a
            :class:`kvquant.evaluation.base.SuiteResult`.
        asks_prompts: Whether answers are generated to prompts, which are prepared once for all
            schemes.
        uses_chat: Whether prompts are turns of the model's chat template.
        metric: The name of the metric that statistics use.
        metric_type: "likelihood" for losses of windows of text, which are compared in nats, or
            "score" for scores of samples from 0 to 1, which are compared in percentage points.
        higher_is_better: Whether a larger metric is better.
        loss_axis: The label of an axis that shows how much a scheme loses, with its unit.
        margin: The margin of equivalence where a study gives none.
        sample: The fields of a line of `samples.jsonl`.
        summary: The metrics that follow from samples.
        check_samples: Further checks of (metrics, samples); raises ValueError.
        table_metrics: Further metrics that the collected table of evaluations has as columns.
        caption: The caption of the suite's LaTeX table; "{suite}" stands for the label, with the
            number of rows where the data is not complete.
        table: The name ("module:attribute") of the function that builds the suite's LaTeX table.
    """

    name: str
    label: str
    tasks: type[Task]
    implementation: str
    asks_prompts: bool
    uses_chat: bool
    metric: str
    metric_type: MetricType
    higher_is_better: bool
    loss_axis: str
    margin: Margin
    sample: type[BaseModel]
    summary: Callable[[Rows], Summary]
    check_samples: Callable[[Mapping[str, float], Rows], None] | None
    table_metrics: tuple[str, ...]
    caption: str
    table: str


SUITES: dict[str, Suite] = {}


def scored_suites() -> list[str]:
    """Returns the suites whose samples have scores, so that a mean over tasks exists."""
    return [name for name, known in SUITES.items() if known.metric_type == "score"]


def likelihood_suites() -> list[str]:
    """Returns the suites whose samples are losses of windows of text."""
    return [name for name, known in SUITES.items() if known.metric_type == "likelihood"]


T = TypeVar("T", bound=type[Task])


def suite(
    *,
    label: str,
    implementation: str,
    metric: str,
    margin: Margin,
    caption: str,
    sample: type[BaseModel] = AnsweredSample,
    summary: Callable[[Rows], Summary] | None = None,
    asks_prompts: bool = True,
    uses_chat: bool = False,
    metric_type: MetricType = "score",
    higher_is_better: bool = True,
    loss_axis: str = "points lost",
    check_samples: Callable[[Mapping[str, float], Rows], None] | None = None,
    table_metrics: tuple[str, ...] = (),
    table: str = "kvquant.analysis.suite_tables:scores",
) -> Callable[[T], T]:
    """Registers a suite on the class of its tasks' options (see :class:`Suite`).

    Without a `summary`, the metric is the samples' mean score in percent.
    """

    def with_tasks(tasks: T) -> T:
        registration = Suite(
            name=only_value(tasks, "suite"),
            label=label,
            tasks=tasks,
            implementation=implementation,
            asks_prompts=asks_prompts,
            uses_chat=uses_chat,
            metric=metric,
            metric_type=metric_type,
            higher_is_better=higher_is_better,
            loss_axis=loss_axis,
            margin=margin,
            sample=sample,
            summary=score_summary(metric) if summary is None else summary,
            check_samples=check_samples,
            table_metrics=table_metrics,
            caption=caption,
            table=table,
        )
        register(SUITES, registration)
        return tasks

    return with_tasks
