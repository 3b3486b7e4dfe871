"""What a suite gets and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from kvquant.errors import UserError
from kvquant.evaluation.chat import DEFAULT_CHAT, Chat


@dataclass(frozen=True)
class SuiteResult:
    """A suite's measurement for one seed.

    Attributes:
        metric: Name of the metric that statistics use.
        higher_is_better: Its direction.
        value: The metric over all samples.
        metrics: Every metric, the named one included.
        protocol: How the cache was read.
        rows: One record a sample, JSON types only.
        tokens: Prompt or text tokens that went through the cache.
        cache_bytes: Bytes allocated by the caches, summed over samples.
        cache_elements: Key and value elements held by those bytes.
    """

    metric: str
    higher_is_better: bool
    value: float
    metrics: dict[str, float]
    protocol: Literal["A", "B"]
    rows: list[dict[str, Any]]
    tokens: int
    cache_bytes: int
    cache_elements: int


@dataclass(frozen=True)
class Context:
    """What a suite runs on.

    Attributes:
        qm: A `kvquant.models.loading.QuantizedModel`.
        task: The task's name in the study, for messages.
        text: part -> text of the task's data set; raises a UserError if none was given.
        progress: Called with (samples done, samples in all).
        batch_tokens: Most tokens of a batch, padding included; None: no limit.
    """

    qm: Any
    task: str
    text: Callable[[Literal["all", "calibration", "test"]], str]
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    batch_tokens: int | None = None

    @property
    def position_limit(self) -> int:
        """Longest sequence of the model."""
        return int(self.qm.position_limit)


@dataclass(frozen=True)
class Source:
    """What a task's prompts are made of; the model's weights are no part of it.

    Attributes:
        tokenizer: The model's tokenizer.
        position_limit: Longest sequence of the model.
        task: The task's name in the study, for messages.
        text: part -> text of the task's data set; raises a UserError if none was given.
        chat: How the model's chat template is filled in.
    """

    tokenizer: Any
    position_limit: int
    task: str
    text: Callable[[Literal["all", "calibration", "test"]], str]
    chat: Chat = DEFAULT_CHAT


class Limited(Protocol):
    """A task on a model with so many positions."""

    @property
    def task(self) -> str:
        """The task's name in the study."""
        ...

    @property
    def position_limit(self) -> int:
        """The number of positions that the model has, scaled ones included."""
        ...


def check_length(context: Limited, length: int, answer: int, field_name: str = "length") -> None:
    """Refuses a task that is longer than the model's positions, scaled ones included.

    Raises:
        UserError: Names the task's field.
    """
    limit = context.position_limit
    if length + answer > limit:
        extra = f" and {answer} of answer" if answer else ""
        raise UserError(
            f"tasks.{context.task}.{field_name}: {length} tokens{extra}, but the model has "
            f"{limit} positions: shorten it, or set rope_scaling in the model's config.json"
        )


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text; `special` adds what the tokenizer puts around a text (BOS)."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
