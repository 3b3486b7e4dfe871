"""Chat templates that write the same on every day, and answers without the thoughts before them.

A template may ask for today's date (`strftime_now`, or a variable `date_string`) and may make the
model think before it answers (`enable_thinking`, `thinking`, `reasoning_effort`). All of these are
options of the model in the study, with fixed defaults: the same specification gives the same
prompts, and the few tokens of an answer are the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from kvquant.study.models import DATE_STRING, ModelSpec, parse_day

THOUGHT, THOUGHT_END = "<think>", "</think>"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def _directives(day: date) -> dict[str, str]:
    """What `strftime` writes at midnight of a day in the C locale, by directive."""
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
    """A template in which `strftime_now` is a macro that writes a fixed day.

    transformers gives every template its own `strftime_now` and lets no caller replace it.
    """
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{key}', '{text}')" for key, text in _directives(day).items())
    # The line end behind the macro is dropped with it: what follows still begins a line.
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
    )


@dataclass(frozen=True)
class Chat:
    """How a model's chat template is filled in.

    Attributes:
        thinking: Whether the model thinks before it answers, where the template has a switch.
        reasoning_effort: Given to templates that have levels of it; None: their default.
        date_string: The day that templates write, as "26 Jul 2024".
    """

    thinking: bool = False
    reasoning_effort: str | None = None
    date_string: str = DATE_STRING

    @classmethod
    def of(cls, model: ModelSpec) -> Chat:
        """The options of a model in a study."""
        return cls(model.thinking, model.reasoning_effort, model.date_string)

    def options(self) -> dict[str, Any]:
        """Variables of the template."""
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
        """A conversation as one text.

        Args:
            tokenizer: With a chat template.
            messages: Its turns, each with `role` and `content`.
            add_generation_prompt: Open the assistant's turn; else the last turn goes on.
            options: Further variables of the template, which go before those here.
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
        """A user's turn and the opened assistant's turn."""
        return self.render(tokenizer, [{"role": "user", "content": text}])


DEFAULT_CHAT = Chat()


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


@dataclass(frozen=True)
class Answer:
    """An answer without its thought.

    Attributes:
        text: What is scored.
        thought: What stood before it; None where there was none.
        finished: Whether the thought came to its end.
    """

    text: str
    thought: str | None = None
    finished: bool = True


def spoken(tokenizer: Any, tokens: Sequence[int]) -> Answer:
    """An answer's tokens as text, its thought apart; an unfinished thought leaves no answer."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    # Where the marks are special tokens they are seen in the raw text alone.
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
    if THOUGHT in raw:
        before, _, thought = text.partition(THOUGHT)
        if THOUGHT not in text:
            before, thought = "", text
        return Answer(before.strip(), thought, finished=False)
    return Answer(text)
