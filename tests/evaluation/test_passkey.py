"""Passkey prompts: exact length, the key where it should be, the published wording."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.evaluation import passkey
from kvquant.evaluation.base import encode
from kvquant.evaluation.passkey import (
    is_right,
    make_sample,
    passkey_prompt,
)
from kvquant.study.tasks import PasskeyTask
from tests.evaluation.asking import asker
from tests.support.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def spec(**changes: Any) -> PasskeyTask:
    return PasskeyTask(**{"suite": "passkey", "length": 300, "samples": 4, **changes})


run_passkey = asker("key")


@given(st.integers(1, 50_000), st.floats(0, 1), st.integers(0, 3000))
def test_prompt_has_the_filler_around_the_key(key: int, depth: float, filler: int) -> None:
    lines = passkey_prompt(key, depth, filler).split("\n")
    assert lines[0] == passkey.TASK and lines[-1] == passkey.QUESTION
    assert lines[2] == f"The pass key is {key}. Remember it. {key} is the pass key."
    assert len(lines) == 5
    assert len(lines[1]) == round(depth * filler)
    assert len(lines[1]) + len(lines[3]) == filler


@given(st.integers(200, 900), st.integers(1, 9), st.integers(0, 2**31 - 1))
@settings(max_examples=25, deadline=None)
def test_sample_fills_the_length(length: int, samples: int, seed: int) -> None:
    for index in {0, samples - 1}:
        sample = make_sample(TOKENIZER, length, samples, index, seed)
        assert length - 8 <= len(encode(TOKENIZER, sample.prompt, special=True)) <= length
        assert index / samples <= sample.depth <= (index + 1) / samples
        assert sample == make_sample(TOKENIZER, length, samples, index, seed)


def test_too_short_a_length_is_named(tiny: Any) -> None:
    with pytest.raises(UserError, match="length: 40 tokens, but the prompt without filler"):
        make_sample(TOKENIZER, 40, 1, 0, 0)
    with pytest.raises(UserError, match=r"tasks\.key\.length: 2047 tokens and 10 of answer"):
        run_passkey(tiny, spec(length=2047), 0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 123. Remember", True), ("1234", False), ("is 5, then 123", False), ("", False)],
)
def test_the_first_number_counts(answer: str, right: bool) -> None:
    assert is_right(answer, 123) is right


@pytest.mark.parametrize("name", ["tiny", "tiny_kivi"])
def test_result_does_not_depend_on_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    qm = request.getfixturevalue(name)
    alone = run_passkey(qm, spec(batch_size=1), 3)
    together = run_passkey(qm, spec(batch_size=3), 3)
    assert together.rows == alone.rows
    assert together.value == alone.value == 100 * sum(r["score"] for r in alone.rows) / 4
    assert len({row["key"] for row in alone.rows}) == 4
    assert run_passkey(qm, spec(batch_size=1), 4).rows != alone.rows


def test_wording_is_the_published_one(data_dir: Path) -> None:
    facts = json.loads((data_dir / "passkey" / "format.json").read_text())["standard"]
    assert facts["task_description"] == passkey.TASK
    assert facts["garbage_unit"] == passkey.FILLER
    assert passkey.FACT.replace("{key}", "{pass_key}") == facts["information_line"]
    assert facts["final_question"] == passkey.QUESTION
    assert facts["max_new_tokens"] == passkey.MAX_NEW_TOKENS


@pytest.mark.fault(
    "evaluation",
    "a tokenizer that drops the filler",
    "refused",
)
def test_a_tokenizer_that_drops_the_filler_is_refused() -> None:
    def drops(text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[1, 2])

    with pytest.raises(UserError, match=r"length: 256 tokens are not reached.*drops the filler"):
        make_sample(drops, 256, 1, 0, 0)
