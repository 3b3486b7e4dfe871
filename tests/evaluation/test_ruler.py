"""RULER samples come from the pinned lm-eval, without a network and without a trace in globals.

Also covers: evaluation.ruler_limits, evaluation.ruler_tasks.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.evaluation.ruler import prompt_text
from kvquant.evaluation.ruler_limits import flaw
from kvquant.evaluation.ruler_tasks import (
    RulerSample,
    WordPairs,
    definition,
    make_samples,
    ruler_names,
    score_answer,
)
from kvquant.fetch.datasets import get_text
from kvquant.study.tasks import RULER_TASKS, RulerTask
from tests.evaluation.asking import asker
from tests.support.models import tiny_tokenizer
from tests.support.text import ESSAYS, TEXT

DOCUMENTS = json.dumps(
    {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": f"Text {number} of article {article} says word{number}.",
                        "qas": [
                            {
                                "question": f"What does text {number} of {article} say?",
                                "is_impossible": number == 3,
                                "answers": [{"text": f"word{number}"}, {"text": "a word"}],
                            }
                        ],
                    }
                    for number in range(10)
                ]
            }
            for article in range(12)
        ]
    }
)
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


run_ruler = asker("ruler", ESSAYS)


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
        text=lambda: ESSAYS,
    )


def test_every_task() -> None:
    assert ruler_names() == tuple(sorted((*NAMES, "qa_1", "qa_2"))) == tuple(sorted(RULER_TASKS))


def questions(seed: int, samples: int = 3, length: int = 400) -> list[RulerSample]:
    return make_samples(
        definition("qa_1"),
        count,
        length=length,
        overhead=10,
        samples=samples,
        seed=seed,
        text=lambda: DOCUMENTS,
    )


def test_questions_stand_below_their_documents_and_seeds_go_on_in_the_file() -> None:
    first, second = questions(0), questions(1)
    asked = [s.question.rsplit("Question: ", 1)[1] for s in first + second]
    # The fourth text's question is one that cannot be answered.
    assert asked == [f"What does text {n} of 0 say?" for n in (0, 1, 2, 4, 5, 6)]
    for sample in first + second:
        assert sample.references[0] in sample.question.split("Question:")[0]
        assert sample.prefix == "Answer:"
        assert 200 < count(sample.question) <= 400 - 32
    assert questions(0) == first
    assert questions(0, samples=5)[:3] != []


def test_documents_of_another_form_are_told() -> None:
    for text in ("no JSON", '{"data": [{}]}', '{"rows": []}', "[1]"):
        with pytest.raises(UserError, match="documents of qa_1"):
            make_samples(
                definition("qa_1"),
                count,
                length=400,
                overhead=0,
                samples=2,
                seed=0,
                text=lambda text=text: text,  # type: ignore[misc]
            )
    with pytest.raises(UserError, match="500 samples, but the data set has 108 questions"):
        questions(0, samples=500)


def test_one_of_several_references_is_a_whole_point() -> None:
    task = definition("qa_1")
    assert task.any_reference
    assert score_answer(task, ["Paris", "the city", "Paris, France"], "\nIt is paris.") == 1.0
    assert score_answer(task, ["Paris"], "") == 0.0
    # lm-eval 0.4.13 itself gives the share.
    document = {"outputs": ["Paris", "the city"], "max_length": 9}
    assert task.score(document, ["paris"])["9"] == 0.5
    both = definition("niah_multivalue")
    assert not both.any_reference and score_answer(both, ["1", "2"], "only 2") == 0.5


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_of_the_real_documents(name: str, data_dir: Path, tmp_path: Path) -> None:
    dataset = {"qa_1": "squad", "qa_2": "hotpotqa"}[name]
    text = get_text(dataset, tmp_path, str(data_dir)).text
    samples = make_samples(
        definition(name), count, length=2500, overhead=10, samples=3, seed=2, text=lambda: text
    )
    for sample in samples:
        assert sample.question.count("Document ") >= 10
        if sample.references[0] not in ("yes", "no"):
            assert sample.references[0] in sample.question


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
    # Only a real import of lm-eval's tasks leaves them there, and it leaves all of them.
    assert "lm_eval.tasks.ruler.prepare_niah" not in sys.modules
    assert ("lm_eval.tasks" in sys.modules) == ("lm_eval.tasks.manager" in sys.modules)
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
            text=lambda: ESSAYS,
        )
    assert len(str(error.value).splitlines()) == 1


TOKENIZERS = {
    "words": count,  # a large vocabulary
    "pairs": lambda text: len(text) // 2,
    "characters": len,
    "none": lambda text: 0,  # broken: a tokenizer that drops everything
}


@pytest.mark.thinned(5)
@pytest.mark.fault(
    "evaluation",
    "RULER at lengths that are too short, odd tokenizers",
    "ends; one line with task, length and what to do",
)
@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", [*NAMES, "qa_1"])
def test_every_length_ends(name: str, tokenizer: str) -> None:
    """Every task at small lengths: a sample that fits and can be answered, or its name."""
    measure = TOKENIZERS[tokenizer]
    faulthandler.dump_traceback_later(120, exit=True)  # lm-eval's loops catch every exception
    try:
        for length in (256, 300, 390, 500, 700):
            try:
                found = make_samples(
                    definition(name),
                    measure,
                    length=length,
                    overhead=30,
                    samples=2,
                    seed=0,
                    text=lambda: DOCUMENTS if name == "qa_1" else ESSAYS * 4,
                )
            except UserError as error:
                assert str(error).startswith(f"length: {length} tokens are too few for {name}: ")
                assert len(str(error).splitlines()) == 1
                assert "longer `length`" in str(error) or "leave the task out" in str(error)
                continue
            for sample in found:
                assert measure(sample.question) <= length
                held = [reference in sample.question for reference in sample.references]
                assert all(held) or (name == "qa_1" and held[0])
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.mark.fault(
    "evaluation",
    "essays shorter than the prompt",
    "refused",
)
@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "Too short. " * 40])
def test_a_text_that_is_too_short_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="length: 1500 tokens, but the essays have fewer"):
        make_samples(
            definition("niah_single_2"),
            count,
            length=1500,
            overhead=10,
            samples=1,
            seed=0,
            text=lambda: text,
        )


@pytest.mark.slow
def test_a_name_drawn_twice_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = random.choices, iter(range(10**6))

    def twice(population: Any, **kwargs: Any) -> Any:
        at = next(calls)
        return ["A", "B", "C"] if at in (0, 1) else draw(population, **kwargs)

    monkeypatch.setattr(random, "choices", twice)
    for sample in make("vt", 0):
        assert len(set(sample.references)) == len(sample.references) == 5


def test_the_most_frequent_words_must_be_three() -> None:
    words = "aaaaaa aaaaaa bbbbbb bbbbbb cccccc"
    named = ["aaaaaa", "bbbbbb", "cccccc"]
    assert flaw(words, named, ranked=True) == ""
    assert "third most frequent" in flaw(f"{words} dddddd", named, ranked=True)
    assert flaw(f"{words} dddddd", named, ranked=False) == ""
    assert "lacks 'cccccc'" in flaw("aaaaaa bbbbbb", named, ranked=True)
    assert "asks for nothing" in flaw(words, [], ranked=False)


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
    [("niah_singel_1", "niah_single_1"), ("qa_3", "qa_1"), ("zzz", "known: cwe")],
)
def test_unknown_task_offers_the_nearest(tiny: Any, name: str, message: str) -> None:
    spec = RulerTask(suite="ruler", task=name, length=512, samples=1)
    with pytest.raises(UserError, match=f"tasks.ruler.task: .*{message}"):
        run_ruler(tiny, spec, 0)


def test_answer_starts_behind_the_assistants_turn() -> None:
    sample = RulerSample("Which one?", "The one is", ["x"])
    text, special = prompt_text(tiny_tokenizer(), sample)
    assert text.endswith("Which one?<|im_end|>\n<|im_start|>assistant\nThe one is")
    assert not special
    assert prompt_text(tiny_tokenizer(chat=False), sample) == ("Which one? The one is", True)


@pytest.mark.slow
def test_runs_on_a_model(tiny: Any, tiny_kivi: Any) -> None:
    spec = RulerTask(suite="ruler", task="niah_single_1", length=1600, samples=2, max_new_tokens=3)
    plain = run_ruler(tiny, spec, 1)
    assert len(plain.rows) == 2
    assert all(row["prompt_tokens"] + 128 <= 1600 for row in plain.rows)
    assert all(row["score"] in (0.0, 1.0) for row in plain.rows)
    assert plain.value == 50 * sum(row["score"] for row in plain.rows)
    packed = run_ruler(tiny_kivi, spec, 1)
    for ours, theirs in zip(packed.rows, plain.rows, strict=True):
        assert ours["references"] == theirs["references"]
        assert ours["prompt_tokens"] == theirs["prompt_tokens"]
    with pytest.raises(UserError, match=r"tasks\.ruler\.length: 4096 tokens.* 2048 positions"):
        run_ruler(tiny, spec.model_copy(update={"length": 4096}), 0)


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
