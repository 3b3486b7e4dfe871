"""Own prompts: scores, turns of seeds, and agreement with the unquantized cache."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import UserError
from kvquant.evaluation.generated import agreement
from kvquant.evaluation.own_prompts import contains, exact, rows_of_seed, token_f1
from kvquant.fetch.prompt_rows import PromptRow, as_lines
from kvquant.study.sample_types import agreed_share, check_own_prompts, own_prompts_summary
from kvquant.study.tasks import OwnPromptsTask
from tests.evaluation.asking import asker


@pytest.mark.parametrize(
    ("answer", "references", "contained", "same"),
    [
        ("It is Paris.", ["Paris"], 1, 0),
        (" paris! ", ["Lyon", "Paris"], 1, 1),
        ("14 days", ["4"], 0, 0),
        ("4 days", ["4"], 1, 0),
        ("-4", ["4"], 1, 0),
        ("x2 = 4.", ["x2 =  4"], 1, 1),
        ("Parisian", ["Paris"], 0, 0),
        ("C++", ["C"], 1, 0),
        ("\u6771\u4eac\u3067\u3059", ["\u6771\u4eac"], 1, 0),  # no blanks between words
        ("\u6771\u4eac\u3002", ["\u6771\u4eac"], 1, 1),
        ("AI\u306f", ["AI"], 1, 0),
        ("Pel\u00e9", ["Pele\u0301"], 1, 1),  # an accent apart, as in files of macOS
        ("PELE\u0301!", ["pel\u00e9"], 1, 1),
        ("Pel\u00e9", ["Pel"], 0, 0),
        ("\u043a\u043e\u0433\u0434\u0430", ["\u0434\u0430"], 0, 0),  # Russian "when", "yes"
        ("\u0414\u0430.", ["\u0434\u0430"], 1, 1),
        ("\u0915\u0940", ["\u0915"], 0, 0),  # a vowel sign of Devanagari
        ("14 or 4", ["4"], 1, 0),
        ("", ["Paris"], 0, 0),
    ],
)
def test_scores(answer: str, references: list[str], contained: int, same: int) -> None:
    assert contains(answer, references) == contained
    assert exact(answer, references) == same


def test_f1_is_the_best_over_answers() -> None:
    assert token_f1("the red house", ["blue", "a red house by a river"]) == pytest.approx(2 / 3)
    assert token_f1("sea", ["blue"]) == 0.0


@given(st.integers(1, 40), st.integers(0, 45), st.integers(0, 9))
def test_seeds_take_turns(available: int, samples: int, first: int) -> None:
    taken = [rows_of_seed(available, samples, first + at) for at in range(4)]
    size = samples if 0 < samples < available else available
    assert all(len(set(rows)) == len(rows) == size and rows == sorted(rows) for rows in taken)
    assert all(0 <= row < available for rows in taken for row in rows)
    if 4 * size <= available:
        assert len({row for rows in taken for row in rows}) == 4 * size


@pytest.mark.parametrize(
    ("one", "other", "agreed", "compared"),
    [
        ([1, 2, 3], [1, 2, 3], 3, 3),
        ([1, 2, 3], [1, 9, 3], 1, 3),
        ([1, 2], [1, 2, 3, 4], 2, 4),
        ([1, 2, 3, 4], [1, 2], 2, 4),
        ([5], [1], 0, 1),
        ([], [], 0, 0),
        ([], [1], 0, 1),
    ],
)
def test_agreement_by_hand(one: list[int], other: list[int], agreed: int, compared: int) -> None:
    found = agreement(one, other)
    assert found == {"agreed_tokens": agreed, "compared_tokens": compared}
    assert agreed_share(found) == (agreed / compared if compared else 1.0)


ROWS = [
    PromptRow(f"The cat sat on mat {n} and the dog ran home.", (str(n),), "q.jsonl", n + 1)
    for n in range(5)
]


def measure(qm: Any, rows: list[PromptRow] = ROWS, seed: int = 0, **options: Any) -> Any:
    settings: dict[str, Any] = {"length": 300, "max_new_tokens": 6, "samples": 2, **options}
    spec = OwnPromptsTask(suite="prompts", dataset="mine", **settings)
    return asker("asked", as_lines(rows))(qm, spec, seed)


def test_accepted_answers(tiny: Any) -> None:
    found = measure(tiny, samples=0)
    assert [row["row"] for row in found.rows] == [0, 1, 2, 3, 4]
    assert [row["references"] for row in found.rows] == [[str(n)] for n in range(5)]
    right = [contains(row["answer"], row["references"]) for row in found.rows]
    assert found.value == 100 * sum(right) / 5 and "identical_share" not in found.metrics
    assert found.metrics["prompts_available"] == 5.0
    said = measure(tiny, [PromptRow(ROWS[0].prompt, (found.rows[0]["answer"],), "q", 1)])
    assert said.value == 100.0
    check_own_prompts(found.metrics, found.rows)


def test_agreement_is_with_the_unquantized_cache(tiny: Any, tiny_kivi: Any) -> None:
    long = [PromptRow(f"{n} " + row.prompt * 6, (), "q.jsonl", n + 1) for n, row in enumerate(ROWS)]
    plain = measure(tiny, long, scoring="agreement", samples=0, max_new_tokens=24)
    found = measure(tiny_kivi, long, scoring="agreement", samples=0, max_new_tokens=24)
    assert plain.value == 100.0 and plain.metrics["identical_share"] == 1.0
    assert found.value < 100.0 and found.metrics["identical_share"] < 1.0
    for mine, base in zip(found.rows, plain.rows, strict=True):
        assert mine["references"] == [base["answer"]] == base["references"]
        assert (mine["answer"] == base["answer"]) >= (mine["score"] == 1.0)
    check_own_prompts(found.metrics, found.rows)
    assert found.metrics.items() >= own_prompts_summary(found.rows).metrics.items()
    for field, value in (("score", 0.123), ("agreed_tokens", None), ("row", 1), ("row", 7)):
        broken = [dict(row) for row in found.rows]
        broken[0][field] = value
        with pytest.raises(ValueError, match="field"):
            check_own_prompts(found.metrics, broken)


def test_the_chat_template_is_an_option(tiny: Any) -> None:
    chat, plain = measure(tiny), measure(tiny, chat=False)
    assert chat.tokens > plain.tokens


def test_refusals_name_the_line(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"tasks.asked.length: q.jsonl, line \d: \d+ tokens, but"):
        measure(tiny, length=24)
    with pytest.raises(UserError, match=r"tasks.asked.length: 5000 tokens, but the model has 2048"):
        measure(tiny, length=5000)
    bare = [PromptRow("Why?", (), "q.jsonl", 1)]
    with pytest.raises(UserError, match=r"tasks.asked.scoring: 'exact' .*q.jsonl, line 1 has none"):
        measure(tiny, bare, scoring="exact")


def test_a_record_must_have_what_the_study_scores() -> None:
    spec = OwnPromptsTask(suite="prompts", dataset="mine", scoring="agreement", samples=9)
    assert spec.samples_expected({"prompts_available": 5.0}) == 5
    spec.check_metrics({"identical_share": 0.5})
    with pytest.raises(ValueError, match="identical_share"):
        spec.check_metrics({"score": 50.0})
    assert spec.title("asked") == "mine, agreement"
