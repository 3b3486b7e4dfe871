"""The inputs and the results of an evaluation suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from kvquant.errors import UserError
from kvquant.evaluation.chat import DEFAULT_CHAT, Chat
from kvquant.models.prompt_tokens import prompt_tokens


@dataclass(frozen=True)
class SuiteResult:
    """Holds a suite's measurement for one seed.

    Attributes:
        metric: Name of the metric that statistics use.
        higher_is_better: Whether a larger value of that metric is better.
        value: Value of that metric over all samples.
        metrics: All metrics by name, including `metric`.
        protocol: Protocol by which the cache was read, "A" or "B".
        rows: One mapping per sample, of JSON types only.
        tokens: Number of prompt or text tokens that went through the cache.
        cache_bytes: Bytes allocated by the caches, summed over samples.
        cache_elements: Number of key and value elements in those bytes.
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
    """Holds the model, texts and settings that a suite runs on.

    Attributes:
        qm: A `kvquant.models.loading.QuantizedModel`.
        task: The task's name in the study, for messages.
        text: Returns a part of the text of the task's data set; raises a UserError without one.
        progress: Called with the number of finished samples and of all samples.
        batch_tokens: Largest number of tokens in a batch, padding included; None sets no limit.
    """

    qm: Any
    task: str
    text: Callable[[Literal["all", "calibration", "test"]], str]
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    batch_tokens: int | None = None

    @property
    def position_limit(self) -> int:
        """Number of the model's positions, scaled ones included."""
        return int(self.qm.position_limit)


@dataclass(frozen=True)
class Source:
    """Holds what a task's prompts are made from, without the model's weights.

    Attributes:
        tokenizer: The model's tokenizer.
        position_limit: Number of the model's positions, scaled ones included.
        task: The task's name in the study, for messages.
        text: Returns a part of the text of the task's data set; raises a UserError without one.
        chat: Options of the model's chat template.
    """

    tokenizer: Any
    position_limit: int
    task: str
    text: Callable[[Literal["all", "calibration", "test"]], str]
    chat: Chat = DEFAULT_CHAT


class Limited(Protocol):
    """Interface of a task on a model with a limited number of positions."""

    @property
    def task(self) -> str:
        """The task's name in the study."""
        ...

    @property
    def position_limit(self) -> int:
        """Number of the model's positions, scaled ones included."""
        ...


def check_length(context: Limited, length: int, answer: int, field_name: str = "length") -> None:
    """Refuses a task whose tokens exceed the model's positions, scaled ones included.

    Raises:
        UserError: The task is too long; the message names its field.
    """
    limit = context.position_limit
    if length + answer > limit:
        extra = f" and {answer} of answer" if answer else ""
        raise UserError(
            f"tasks.{context.task}.{field_name}: {length} tokens{extra}, but the model has "
            f"{limit} positions: shorten it, or set rope_scaling in the model's config.json"
        )


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Returns the token ids of a text, with `special` also the tokenizer's BOS before it."""
    return prompt_tokens(tokenizer, text, special=special)
