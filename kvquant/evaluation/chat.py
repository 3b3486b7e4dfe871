"""Chat templates with a fixed date, and answers without the thoughts before them.

A template may ask for today's date (`strftime_now`, or a variable `date_string`) and may make the
model think before it answers (`enable_thinking`, `thinking`, `reasoning_effort`). All of these are
options of the model in the study with fixed defaults, so that the same specification always gives
the same prompts, and the few tokens of an answer are not spent on thoughts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from kvquant.study.models import DATE_STRING, ModelSpec, parse_day

THOUGHT, THOUGHT_END = "<think>", "</think>"
OPENING = 64  # last tokens of a prompt, more than the assistant's opened turn and RULER's prefix
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def _directives(day: date) -> dict[str, str]:
    """Returns the output of each `strftime` directive for midnight of a day in the C locale."""
    weekday, month = DAYS[day.weekday()], MONTHS[day.month - 1]
    numbers = {"d": day.day, "m": day.month, "y": day.year % 100}
    numbers |= {"H": 0, "I": 12, "M": 0, "S": 0}
    found = {f"%{key}": f"{value:02d}" for key, value in numbers.items()}
    found |= {f"%-{key}": str(value) for key, value in numbers.items()}
    found |= {"%e": f"{day.day:2d}", "%j": f"{day.timetuple().tm_yday:03d}", "%Y": str(day.year)}
    found |= {"%a": weekday[:3], "%A": weekday, "%b": month[:3], "%h": month[:3], "%B": month}
    found |= {"%p": "AM", "%f": "000000", "%z": "", "%Z": ""}
    found |= {"%F": day.isoformat(), "%T": "00:00:00", "%X": "00:00:00"}
    short = f"{day.month:02d}/{day.day:02d}/{day.year % 100:02d}"
    found |= {"%D": short, "%x": short}
    found["%c"] = f"{weekday[:3]} {month[:3]} {day.day:2d} 00:00:00 {day.year}"
    return found


def with_fixed_day(template: str, day: date) -> str:
    """Returns a template in which `strftime_now` is a macro that writes a fixed day.

    transformers gives every template its own `strftime_now`, which a caller cannot replace.
    """
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{key}', '{text}')" for key, text in _directives(day).items())
    # Jinja drops the line end after the macro with it, so the template still begins a line.
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
    )


@dataclass(frozen=True)
class Chat:
    """Holds the options of a model's chat template.

    Attributes:
        thinking: Whether the model thinks before it answers, if the template has a switch.
        reasoning_effort: Level for templates that have one; None takes the template's default.
        date_string: The day that templates write, such as "26 Jul 2024".
    """

    thinking: bool = False
    reasoning_effort: str | None = None
    date_string: str = DATE_STRING

    @classmethod
    def of(cls, model: ModelSpec) -> Chat:
        """Returns the options of a model in a study."""
        return cls(model.thinking, model.reasoning_effort, model.date_string)

    def options(self) -> dict[str, Any]:
        """Returns the options as variables of the template."""
        found: dict[str, Any] = {
            "enable_thinking": self.thinking,
            "thinking": self.thinking,
            "date_string": self.date_string,
        }
        if self.reasoning_effort is not None:
            found["reasoning_effort"] = self.reasoning_effort
        return found

    def render(
        self,
        tokenizer: Any,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """Returns a conversation as one text.

        Args:
            tokenizer: A tokenizer with a chat template.
            messages: The turns, each with `role` and `content`.
            add_generation_prompt: Whether to open the assistant's turn; otherwise the last turn
                stays open.
            options: Further variables of the template, which override the options.
        """
        template = with_fixed_day(tokenizer.get_chat_template(), parse_day(self.date_string))
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **{**self.options(), **options},
            )
        )

    def turn(self, tokenizer: Any, text: str) -> str:
        """Returns a user's turn followed by the opened assistant's turn."""
        return self.render(tokenizer, [{"role": "user", "content": text}])


DEFAULT_CHAT = Chat()


def has_template(tokenizer: Any) -> bool:
    """Returns whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


@dataclass(frozen=True)
class Answer:
    """Holds an answer and the thought before it.

    Attributes:
        text: The answer without its thought, which is scored.
        thought: The thought, or None if there was none.
        finished: Whether the thought has ended.
    """

    text: str
    thought: str | None = None
    finished: bool = True


def begins_in_thought(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Returns whether a prompt ends in a thought that the chat template has opened.

    Templates of models that always think open it (DeepSeek-R1, QwQ), some after every switch.
    """
    end = str(tokenizer.decode(prompt[-OPENING:], skip_special_tokens=False))
    return end.rfind(THOUGHT) > end.rfind(THOUGHT_END)


def split_thought(tokenizer: Any, tokens: Sequence[int], *, inside: bool = False) -> Answer:
    """Decodes an answer and separates its thought; after an unfinished thought it is empty.

    Args:
        tokenizer: The model's tokenizer.
        tokens: Token ids of the answer.
        inside: Whether the answer begins in a thought (:func:`begins_in_thought`).
    """
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    # If the marks are special tokens, only the raw text contains them.
    raw = str(tokenizer.decode(tokens, skip_special_tokens=False))
    if THOUGHT_END in raw:
        if THOUGHT_END in text:
            thought, _, rest = text.rpartition(THOUGHT_END)
        else:
            end = tokenizer.convert_tokens_to_ids(THOUGHT_END)
            at = len(tokens) - 1 - list(reversed(tokens)).index(end)
            thought, rest = (
                str(tokenizer.decode(part, skip_special_tokens=True))
                for part in (tokens[:at], tokens[at + 1 :])
            )
        return Answer(rest.lstrip(), thought)
    if inside:
        return Answer("", text, finished=False)
    if THOUGHT in raw:
        before, _, thought = text.partition(THOUGHT)
        if THOUGHT not in text:
            before, thought = "", text
        return Answer(before.strip(), thought, finished=False)
    return Answer(text)
