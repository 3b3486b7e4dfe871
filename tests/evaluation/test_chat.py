"""Chat templates: the same text on every day, thinking off unless asked for, thoughts set apart."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import transformers.utils.chat_template_utils as templates
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.evaluation.base import Context
from kvquant.evaluation.chat import (
    Answer,
    Chat,
    _directives,
    begins_in_thought,
    split_thought,
    with_fixed_day,
)
from kvquant.evaluation.generated import Prompt, Rules, SeedPrompts, answer_seeds
from kvquant.evaluation.longbench import as_tokens
from kvquant.evaluation.ruler import prompt_text
from kvquant.evaluation.ruler_tasks import RulerSample
from kvquant.study.config import Study
from kvquant.study.digests import calibration_digest, eval_digest, prompts_digest, quantizer_digest
from kvquant.study.models import ModelSpec
from tests.support.models import CHAT_TEMPLATE, tiny_tokenizer

THINKING = CHAT_TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
DATED = {
    "call": "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHAT_TEMPLATE,
    "Llama 3": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}"
    "{{- 'Today: ' + date_string + '\n' }}" + CHAT_TEMPLATE,
    "in a macro and a loop": "{% macro day(format) %}{{ strftime_now(format) }}{% endmacro %}"
    "{% for m in messages %}{{ 'Today: ' + day('%d %b %Y') + '\n' + m.content }}{% endfor %}",
}


class Tomorrow(datetime.datetime):
    """A clock of another day."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Tomorrow:
        return cls(2031, 5, 6, 7, 8, 9)


def tokenizer(template: str) -> Any:
    found = tiny_tokenizer()
    found.chat_template = template
    return found


@pytest.mark.fault(
    "evaluation",
    "another day on the clock of a chat template",
    "the same prompts",
)
@pytest.mark.parametrize("template", DATED.values(), ids=list(DATED))
def test_a_template_writes_the_same_day_every_day(template: str) -> None:
    dated = tokenizer(template)
    sample = RulerSample("Who wrote it?", "It was", ["x"])
    today = (prompt_text(dated, sample), as_tokens(dated, "Who?", True))
    with mock.patch.object(templates, "datetime", Tomorrow):
        assert (prompt_text(dated, sample), as_tokens(dated, "Who?", True)) == today
    assert today[0][0].startswith("Today: 26 Jul 2024\n")
    other = Chat(date_string="3 Feb 2025")
    assert "Today: 3 Feb 2025" in prompt_text(dated, sample, other)[0].replace("03 ", "3 ")


@given(
    st.dates(datetime.date(1000, 1, 1), datetime.date(9999, 12, 31)),
    st.sampled_from(sorted(_directives(datetime.date(2024, 7, 26)))),
)
@settings(deadline=None)
def test_a_day_is_written_as_by_strftime(day: datetime.date, directive: str) -> None:
    midnight = datetime.datetime(day.year, day.month, day.day)
    assert _directives(day)[directive] == midnight.strftime(directive)


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, "\n" + CHAT_TEMPLATE, "  {% if true %}\n  a\n  {% endif %}b"]
)
def test_the_fixed_day_changes_nothing_else(template: str) -> None:
    asks = "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    for text in (template, template + asks):
        turn = [{"role": "user", "content": "Hi"}]
        found = Chat().render(tokenizer(text), turn)
        plain = tokenizer(text).apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        )
        assert found == plain
    assert with_fixed_day(template, datetime.date(2024, 7, 26)) == template


@pytest.mark.fault(
    "evaluation",
    "a model that thinks by default",
    "does not think unless the study says so",
)
def test_thinking_is_off_unless_asked_for() -> None:
    hybrid = tokenizer(THINKING)
    for text in (hybrid.decode(as_tokens(hybrid, "Who?", True)), ask(hybrid, Chat())):
        assert "<think>\n\n</think>" in text
    assert "<think>" not in ask(hybrid, Chat(thinking=True))
    effort = tokenizer("{{ reasoning_effort | default('medium') }} {{ thinking }}")
    assert ask(effort, Chat()).startswith("medium False")
    assert ask(effort, Chat(True, "low")).startswith("low True")


def ask(found: Any, chat: Chat) -> str:
    return prompt_text(found, RulerSample("Who?", "", []), chat)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mary", Answer("Mary")),
        ("<think>\nHm. Mary?</think>\n\nMary", Answer("Mary", "<think>\nHm. Mary?")),
        ("Hm.</think>Mary</think> Ann", Answer("Ann", "Hm.</think>Mary")),
        ("<think>\nMary Shelley", Answer("", "\nMary Shelley", finished=False)),
        ("a < b and think > c", Answer("a < b and think > c")),
        ("", Answer("")),
    ],
)
@pytest.mark.parametrize("special", [None, False, True])
def test_thoughts_stand_apart(text: str, expected: Answer, special: bool | None) -> None:
    found = tiny_tokenizer()
    if special is not None:
        from tokenizers import AddedToken

        marks = [AddedToken(mark, special=special) for mark in ("<think>", "</think>")]
        found.add_tokens(marks, special_tokens=special)
    answer = split_thought(found, found(text, add_special_tokens=False).input_ids)
    assert (answer.text, answer.finished) == (expected.text, expected.finished)
    assert (answer.thought is None) == (expected.thought is None)
    if not special:
        assert answer == expected


@pytest.mark.fault(
    "evaluation",
    "an answer that is an unfinished thought",
    "empty; the share is reported",
)
def test_unfinished_thoughts_are_reported(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["<think>\nkey", "<think>\nHm</think>key", "key", "no"]
    tokens = [tiny.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    found = SimpleNamespace(tokens=tokens, row_bytes=[1] * 4, row_elements=[1] * 4)
    monkeypatch.setattr("kvquant.evaluation.generated.greedy", lambda *a, **k: found)
    rules = Rules(lambda prompt, answer: float("key" in answer))
    seed = SeedPrompts([Prompt([1], {}) for _ in texts], 4)
    [result] = answer_seeds(Context(tiny, "t", lambda part: ""), [seed], rules, 4)
    assert result.value == 50.0
    assert result.metrics["thought_share"] == 0.5
    assert result.metrics["thought_unfinished_share"] == 0.25
    assert ["thought" in row for row in result.rows] == [True, True, False, False]
    plain = SimpleNamespace(tokens=tokens[2:], row_bytes=[1] * 2, row_elements=[1] * 2)
    monkeypatch.setattr("kvquant.evaluation.generated.greedy", lambda *a, **k: plain)
    seed = SeedPrompts([Prompt([1], {}) for _ in texts[2:]], 4)
    [result] = answer_seeds(Context(tiny, "t", lambda part: ""), [seed], rules, 4)
    assert set(result.metrics) == {"score"}


ALWAYS = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.fault(
    "evaluation",
    "a template that opens the thought itself",
    "an answer that does not end it is an unfinished thought",
)
@pytest.mark.parametrize("special", [None, False, True])
def test_a_thought_that_the_template_opens_is_not_an_answer(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, special: bool | None
) -> None:
    found = tokenizer(ALWAYS)
    if special is not None:
        from tokenizers import AddedToken

        marks = [AddedToken(mark, special=special) for mark in ("<think>", "</think>")]
        found.add_tokens(marks, special_tokens=special)
    texts = ["Hm, the key", "Hm.</think>\n\nkey", "key <think> key", "no"]
    tokens = [found(text, add_special_tokens=False).input_ids for text in texts]
    sizes = {"row_bytes": [1] * 4, "row_elements": [1] * 4}
    monkeypatch.setattr(
        "kvquant.evaluation.generated.greedy",
        lambda *a, **k: SimpleNamespace(tokens=tokens, **sizes),
    )
    context = Context(SimpleNamespace(tokenizer=found, approximates=False), "t", lambda part: "")
    rules = Rules(lambda prompt, answer: float("key" in answer))
    sample = RulerSample("Where is the key? " * 20, "The key is", [])
    for prompt in (
        as_tokens(found, "Where is the key? " * 20, True),
        found(prompt_text(found, sample)[0], add_special_tokens=False).input_ids,
    ):
        [result] = answer_seeds(context, [SeedPrompts([Prompt(prompt, {})] * 4, 9)], rules, 4)
        assert [row["answer"] for row in result.rows] == ["", "key", "", ""]
        assert result.metrics["thought_share"] == 1.0
        assert result.metrics["thought_unfinished_share"] == 0.75
    closed = tokenizer(THINKING)
    for prompt in (
        as_tokens(closed, "Why?", True),
        closed("<think> of it " + "Why? " * 99).input_ids,
    ):
        assert not begins_in_thought(closed, prompt)
    assert not begins_in_thought(tiny.tokenizer, [1])


def study(**options: Any) -> Study:
    return Study.model_validate(
        {
            "study": "s",
            "models": {"m": {"source": "local", "path": "x", **options}},
            "schemes": {"fp16": {"kind": "fp16"}, "nuq": {"kind": "nuq", "bits": 3}},
            "headline": "nuq",
            "tasks": {
                "long": {"suite": "longbench", "task": "lcc"},
                "ruler": {"suite": "ruler", "task": "vt"},
                "passkey": {"suite": "passkey"},
                "ppl": {"suite": "perplexity"},
            },
        }
    )


def test_only_what_asks_in_a_template_depends_on_its_options() -> None:
    plain = study()
    same = study(thinking=False, date_string="26 Jul 2024", reasoning_effort=None)
    for options in ({"thinking": True}, {"date_string": "1 Jan 2025"}, {"reasoning_effort": "low"}):
        other = study(**options)
        for task in ("long", "ruler", "passkey", "ppl"):
            digests = [eval_digest(s, "m", "nuq", task, 0) for s in (plain, same, other)]
            assert digests[0] == digests[1]
            assert (digests[0] != digests[2]) == (task in ("long", "ruler"))
            if task != "ppl":
                digests = [prompts_digest(s, "m", task) for s in (plain, same, other)]
                assert digests[0] == digests[1]
                assert (digests[0] != digests[2]) == (task in ("long", "ruler"))
        assert calibration_digest(plain, "m") == calibration_digest(other, "m")
        for scheme in ("fp16", "nuq"):
            assert quantizer_digest(plain, "m", scheme) == quantizer_digest(other, "m", scheme)


def test_the_digest_of_before_stays() -> None:
    raw = {"source": "local", "path": "x"}
    assert set(ModelSpec.model_validate(raw).model_dump()) == {
        *("source", "repo", "revision", "path", "package", "sha256", "gpus", "mem_gb")
    }


@pytest.mark.parametrize("day", ["today", "2024-07-26", "31 Feb 2024", "1 Xyz 2024", ""])
def test_a_day_that_is_none_is_refused(day: str, tmp_path: Path) -> None:
    from kvquant.study.config import parse_study

    raw = study().model_dump(mode="json")
    raw["models"]["m"]["date_string"] = day
    with pytest.raises(UserError, match=r"models\.m\.date_string: .*26 Jul 2024"):
        parse_study(raw)
