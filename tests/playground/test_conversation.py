"""Conversations: one cache that grows, turns that read what is new alone, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvquant
from kvquant.errors import OutlierOverflow, UserError
from kvquant.models.generation import greedy
from kvquant.playground.conversation import Conversation
from tests.support.models import tiny_model, tiny_tokenizer

NEW = 6


class Seen:
    """A streamer that keeps the tokens of each prompt and answer."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.fixture(scope="module", params=["fp16", "kivi"])
def qm(place: Path, request: pytest.FixtureRequest) -> Any:
    kivi = {"kind": "kivi", "bits": 4, "group": 16, "residual": 16}
    return kvquant.load(place / "model", "fp16" if request.param == "fp16" else kivi, device="cpu")


def test_a_turn_reads_what_is_new_over_the_same_cache(qm: Any) -> None:
    talk, seen = Conversation(qm), Seen()
    first = talk.ask("The sky is blue. Is the grass?", NEW, streamer=seen)
    assert first.tokens == first.read + len(seen.parts) - 2  # the last token is never read
    assert first.cache_bytes > 0 and first.bits_per_element > 0
    other = Seen()
    second = talk.ask("Why?", NEW, streamer=other)
    prompt = other.parts[0]
    assert prompt[: len(seen.parts[0])] == seen.parts[0]
    assert second.read == len(prompt) - first.tokens < 30
    assert second.tokens > first.tokens
    if not qm.quantizes:  # another cut into calls changes nothing there
        assert second.answer == qm.tokenizer.decode(
            greedy(qm, [prompt], NEW, batch_size=1).tokens[0], skip_special_tokens=True
        )
    talk.reset()
    again = talk.ask("The sky is blue. Is the grass?", NEW)
    assert (again.answer, again.tokens) == (first.answer, first.tokens)


def test_a_system_message_comes_first(qm: Any) -> None:
    seen = Seen()
    Conversation(qm, system="Be short.").ask("Why?", 2, streamer=seen)
    text = qm.tokenizer.decode(seen.parts[0])
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhy?")


def test_a_template_that_rewrites_earlier_turns_reads_all_again(
    qm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = "{% set messages = messages[-1:] %}"  # it forgets all but the last turn
    monkeypatch.setattr(qm.tokenizer, "chat_template", last + qm.tokenizer.chat_template)
    talk, seen = Conversation(qm), Seen()
    talk.ask("The sky is blue. Is the grass?", NEW)
    second = talk.ask("Why?", NEW, streamer=seen)
    assert second.read == len(seen.parts[0])
    assert "sky" not in qm.tokenizer.decode(seen.parts[0])


def test_an_answer_can_be_stopped(qm: Any) -> None:
    talk, seen = Conversation(qm), Seen()
    turn = talk.ask("The sky", 40, streamer=seen, stop=lambda: len(seen.parts) > 3)
    assert 3 <= turn.new_tokens <= 4 and not turn.ended  # releases stream before or after it
    assert talk.ask("Go on", 2).tokens > turn.tokens


def test_lost_outliers_lead_to_a_wider_cache(qm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Conversation(qm).ask("The sky", NEW)
    made = qm.new_cache
    widened: list[Any] = []

    def lossy(*args: Any) -> Any:
        cache = made(*args)

        def settle() -> None:
            if not widened:
                raise OutlierOverflow("no room")

        cache.settle, cache.widen = settle, lambda: widened.append(cache)
        return cache

    monkeypatch.setattr(qm, "new_cache", lossy)
    assert Conversation(qm).ask("The sky", NEW).answer == plain.answer
    assert len(widened) == 1


def test_a_conversation_ends_where_the_positions_do(qm: Any) -> None:
    talk = Conversation(qm)
    first = talk.ask("The sky is blue. " * 60, 512)
    assert first.read + first.new_tokens <= 512
    with pytest.raises(UserError, match="the model has 512 positions; /reset begins anew"):
        talk.ask("The sky is blue. " * 60, 4)
    talk.reset()
    assert talk.ask("Why?", 2).tokens < 60


def test_a_failed_call_leaves_a_conversation_that_goes_on(
    qm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, seen = Conversation(qm), Seen()
    talk.ask("The sky", NEW)
    with monkeypatch.context() as patch:
        patch.setattr(qm.model, "generate", lambda **given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            talk.ask("Why?", NEW)
    again = talk.ask("Why?", NEW, streamer=seen)
    assert again.read == len(seen.parts[0])  # all of it, into a new cache


REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "text", "told"),
    [
        (REFUSING, "a", r"conversation: the chat template refuses its turns \(no system\)"),
        ("{% for m in messages %}", "a", "conversation: the chat template refuses its turns"),
        (None, "\ud800", "conversation: holds half of a surrogate pair"),
    ],
)
def test_a_refused_turn_takes_one_line(
    qm: Any, monkeypatch: pytest.MonkeyPatch, template: str | None, text: str, told: str
) -> None:
    if template:
        monkeypatch.setattr(qm.tokenizer, "chat_template", template)
    talk = Conversation(qm, system="Be kind.")
    with pytest.raises(UserError, match=told):
        talk.ask(text, 2)


def test_another_models_tokenizer_is_refused() -> None:
    qm = kvquant.load(tiny_model(), "fp16", tokenizer=tiny_tokenizer())  # of 97 tokens
    with pytest.raises(UserError, match="tokenizer: gives the id"):
        Conversation(qm).ask("The sky", 2)


def test_a_template_is_needed(qm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qm.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template; use kvquant generate"):
        Conversation(qm)
