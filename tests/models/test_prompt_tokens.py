"""Prompts end where their text ends, whatever a tokenizer adds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.evaluation.base import encode
from kvquant.evaluation.longbench import as_tokens
from kvquant.models.prompt_tokens import prompt_tokens
from kvquant.models.text_generation import tokenized
from tests.support.models import adding, tiny_tokenizer

PLAIN = tiny_tokenizer()
BOS, EOS = PLAIN.bos_token, PLAIN.eos_token
TEMPLATES = [
    ("$A", 0),
    (f"{BOS} $A", 1),
    (f"$A {EOS}", 0),
    (f"{BOS} $A {EOS}", 1),
    (f"{BOS} {BOS} $A {EOS} {EOS}", 2),
]


@pytest.mark.fault(
    "evaluation",
    "a tokenizer that ends every text with EOS",
    "prompts end with their text",
)
@pytest.mark.parametrize(("template", "before"), TEMPLATES)
def test_nothing_stands_behind_a_prompt(template: str, before: int) -> None:
    tokenizer = adding(template)
    expected = [PLAIN.bos_token_id] * before + PLAIN("The sky is").input_ids
    ways: list[list[int]] = [
        prompt_tokens(tokenizer, "The sky is"),
        encode(tokenizer, "The sky is", special=True),
        as_tokens(tokenizer, "The sky is", False),
        *tokenized(tokenizer, ["The sky is"], False),
    ]
    assert ways == [expected] * len(ways)
    assert encode(tokenizer, "The sky is", special=False) == expected[before:]


@pytest.mark.parametrize("template", [f"{BOS} $A", f"{BOS} $A {EOS}"])
def test_a_text_that_begins_with_bos_gets_no_second(template: str) -> None:
    tokenizer = adding(template)
    expected = [PLAIN.bos_token_id, *PLAIN("The sky is").input_ids]
    for way in (
        prompt_tokens(tokenizer, f"{BOS}The sky is"),
        as_tokens(tokenizer, f"{BOS}The sky is", False),
        *tokenized(tokenizer, [f"{BOS}The sky is"], False),
    ):
        assert way == expected


@given(st.text(max_size=20), st.sampled_from(TEMPLATES))
def test_all_of_a_text_is_kept(text: str, how: tuple[str, int]) -> None:
    """Also a text that ends with an end token of its own."""
    tokenizer: Any = adding(how[0])
    for whole in (text, text + EOS):
        expected = [PLAIN.bos_token_id] * how[1] + PLAIN(whole).input_ids
        assert prompt_tokens(tokenizer, whole) == expected
