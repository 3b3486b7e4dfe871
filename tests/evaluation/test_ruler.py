"""RULER samples come from the pinned lm-eval, without a network."""

import pytest

from kvquant.errors import UserError
from kvquant.evaluation.passkey import is_right
from kvquant.evaluation.perplexity import window_starts
from kvquant.evaluation.ruler_tasks import definition, make_samples

ESSAYS = "This is a sentence about nothing. Another one follows it at once. " * 400


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_1", "vt"])
def test_samples_hold_their_answers_and_fit(name: str) -> None:
    task = definition(name)
    settings = {"length": 1500, "overhead": 10, "samples": 2, "essays": lambda: ESSAYS}
    first = make_samples(task, count, seed=3, **settings)
    assert first == make_samples(task, count, seed=3, **settings)
    assert first != make_samples(task, count, seed=4, **settings)
    for sample in first:
        for reference in sample.references:
            assert reference in sample.question
        assert count(sample.question) <= 1500


def test_unknown_task_offers_the_nearest() -> None:
    with pytest.raises(UserError, match="niah_single_1"):
        definition("niah_singel_1")


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 123. Remember", True), ("1234", False), ("is 5, then 123", False), ("", False)],
)
def test_passkey_takes_the_first_number(answer: str, right: bool) -> None:
    assert is_right(answer, 123) is right


def test_windows_do_not_overlap() -> None:
    for seed in range(5):
        starts = window_starts(10_000, 512, 4, seed)
        assert all(b - a >= 512 for a, b in zip(starts, starts[1:], strict=False))
        assert starts[-1] + 512 <= 10_000
    with pytest.raises(UserError, match="window"):
        window_starts(100, 512, 1, 0)
