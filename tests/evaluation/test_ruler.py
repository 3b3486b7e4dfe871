"""RULER samples come from the pinned lm-eval, without a network and without a trace in globals."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.config import RulerTask
from kvquant.errors import UserError
from kvquant.evaluation.base import Context
from kvquant.evaluation.ruler import prompt_text, run_ruler
from kvquant.evaluation.ruler_tasks import (
    RulerSample,
    WordPairs,
    definition,
    make_samples,
    ruler_names,
)
from tests.evaluation.tiny import TEXT, tiny_tokenizer

ESSAYS = "This is a sentence about nothing. Another one follows it at once. " * 400
NAMES = (
    "cwe",
    "fwe",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "vt",
)


def count(text: str) -> int:
    return len(text.split())


def make(name: str, seed: int, samples: int = 2, length: int = 1500) -> list[RulerSample]:
    return make_samples(
        definition(name),
        count,
        length=length,
        overhead=10,
        samples=samples,
        seed=seed,
        essays=lambda: ESSAYS,
    )


def context(qm: Any) -> Context:
    return Context(qm, "ruler", lambda part: ESSAYS)


def test_every_task_but_the_documents_ones() -> None:
    assert ruler_names() == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_samples_hold_their_answers_and_fit(name: str) -> None:
    first = make(name, 3)
    for sample in first:
        assert sample.references and sample.prefix
        for reference in sample.references:
            assert reference in sample.question
        assert count(sample.question) <= 1500
    # Neither other seeds nor more samples in between change a seed's samples.
    other = make(name, 4, samples=3)
    assert other[:2] != first
    assert make(name, 3, samples=3)[:2] == first
    assert make(name, 4, samples=3) == other


@pytest.mark.slow
def test_needles_share_one_question_in_the_singular() -> None:
    sample = make("niah_multikey_1", 0)[0]
    assert sample.question.count("One of the special magic numbers for") == 4
    assert sample.question.count(sample.references[0]) == 1
    key = sample.prefix.removeprefix("The special magic number for ").split(" mentioned")[0]
    assert f"magic numbers for {key} is: {sample.references[0]}." in sample.question
    assert sample.question.rstrip().split("\n")[-1].startswith("What is the special magic number")


@pytest.mark.slow
def test_leaves_global_state_alone(capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)
    before = random.random()
    make("vt", 1)
    make("niah_single_1", 1)
    assert [before, random.random(), random.random()] == expected
    assert "lm_eval.tasks.ruler.prepare_niah" not in sys.modules
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vt", "cwe", "fwe", "niah_single_2"])
def test_too_short_a_length_ends_with_its_name(name: str) -> None:
    with pytest.raises(UserError, match=f"length: 256 tokens are too few for {name}") as error:
        make_samples(
            definition(name),
            lambda text: len(text) // 2,
            length=256,
            overhead=30,
            samples=2,
            seed=0,
            essays=lambda: ESSAYS,
        )
    assert len(str(error.value).splitlines()) == 1


WORDS = st.lists(st.text(alphabet="ab-", min_size=1, max_size=3), min_size=1, max_size=6)


@given(WORDS, WORDS)
def test_word_pairs_equal_the_sorted_list(firsts: list[str], seconds: list[str]) -> None:
    pairs = WordPairs(firsts, seconds)
    built = sorted({f"{a}-{b}" for a in firsts for b in seconds})
    assert len(pairs) == len(built)
    assert list(pairs) == built
    with pytest.raises(IndexError):
        pairs[len(pairs)]


@pytest.mark.parametrize(
    ("name", "message"),
    [("niah_singel_1", "niah_single_1"), ("qa_1", "documents"), ("zzz", "known: cwe")],
)
def test_unknown_task_offers_the_nearest(tiny: Any, name: str, message: str) -> None:
    spec = RulerTask(suite="ruler", task=name, length=512, samples=1)
    with pytest.raises(UserError, match=f"tasks.ruler.task: .*{message}"):
        run_ruler(context(tiny), spec, 0)


def test_answer_starts_behind_the_assistants_turn() -> None:
    sample = RulerSample("Which one?", "The one is", ["x"])
    text, special = prompt_text(tiny_tokenizer(), sample)
    assert text.endswith("Which one?<|im_end|>\n<|im_start|>assistant\nThe one is")
    assert not special
    assert prompt_text(tiny_tokenizer(chat=False), sample) == ("Which one? The one is", True)


@pytest.mark.slow
def test_runs_on_a_model(tiny: Any, tiny_kivi: Any) -> None:
    spec = RulerTask(suite="ruler", task="niah_single_1", length=1600, samples=2, max_new_tokens=3)
    plain = run_ruler(context(tiny), spec, 1)
    assert len(plain.rows) == 2
    assert all(row["prompt_tokens"] + 128 <= 1600 for row in plain.rows)
    assert all(row["score"] in (0.0, 1.0) for row in plain.rows)
    assert plain.value == 50 * sum(row["score"] for row in plain.rows)
    packed = run_ruler(context(tiny_kivi), spec, 1)
    for ours, theirs in zip(packed.rows, plain.rows, strict=True):
        assert ours["references"] == theirs["references"]
        assert ours["prompt_tokens"] == theirs["prompt_tokens"]
    with pytest.raises(UserError, match=r"tasks\.ruler\.length: 4096 tokens.* 2048 positions"):
        run_ruler(context(tiny), spec.model_copy(update={"length": 4096}), 0)


def test_score_counts_every_reference() -> None:
    score = definition("niah_multivalue").score
    document = {"outputs": ["111", "222"], "max_length": 900}
    assert score(document, [" 111 and 333"])["900"] == 0.5
    assert score(document, ["222, 111"])["900"] == 1.0


def test_facts_agree_with_the_reference(data_dir: Path) -> None:
    facts = json.loads((data_dir / "ruler" / "tasks.json").read_text())
    lengths = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}
    for name in NAMES:
        assert definition(name).max_new_tokens == lengths[name.split("_")[0]]
    niah = facts["families"]["niah"]
    assert niah["tokens_to_generate"] == lengths["niah"]
    start = niah["template"].split("{")[0].replace("Some", "A")
    assert make("niah_single_1", 0)[0].question.startswith(start)


def test_tiny_text_is_long_enough_for_the_tokenizer() -> None:
    assert len(tiny_tokenizer()(TEXT).input_ids) < len(TEXT) / 3
