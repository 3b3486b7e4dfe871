"""Our scores equal those that lm-eval's own task objects would give, on 240 answers a task."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from typing import Any
from unittest import mock

import pytest

from kvquant.evaluation import longbench_tasks, ruler_tasks
from kvquant.study.tasks import LONGBENCH_TASKS, RULER_TASKS

ANSWERS = 240
EDGES = (
    *("", " ", "\n", "\n\n", "\nParis", "\n\n  Paris\nBerlin", "Paris\n", "The answer: Paris."),
    *(
        "パリ",
        "Zürich — naïve café",
        "a\u2028b",
        "\x00\x07 Paris",
        "🦊 Paris",
        "\ufb01ne \uff30\uff21\uff32\uff29\uff33",
    ),
    *("Paris, Berlin and Rome", "Paragraph 3", "Paragraph 3 and Paragraph 14", "3", "٣", "13"),
    *("unanswerable", "`x = 1`\n# no\ny = 2", "// only\n# these", "    return x\nz", "." * 40),
)
WORDS = (
    "Paris",
    "berlin",
    "the",
    "a",
    "Rome",
    "Paragraph",
    "3",
    "14",
    "x = 1",
    "é",
    "\n",
    "  ",
    ",",
)
CLASSES = ["Paris", "Paris city", "Rome", "Number", "Number of things"]
RULE_OF_FIRST_LINE = {"trec", "triviaqa", "samsum"}
# What each task's metric is called in lm-eval; the file that is read at run time must still say so.
METRICS = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa"), "qa_f1_score"),
    **dict.fromkeys(("2wikimqa", "musique", "triviaqa"), "qa_f1_score"),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge_score"),
    "trec": "classification_score",
    "passage_retrieval_en": "retrieval_score",
    "passage_count": "count_score",
    **dict.fromkeys(("lcc", "repobench-p"), "code_sim_score"),
}


def answers(seed: str) -> list[str]:
    rng = random.Random(seed)
    made = [
        " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 14)))
        for _ in range(ANSWERS - len(EDGES))
    ]
    return [*EDGES, *made]


def references(task: str, rng: random.Random) -> list[str]:
    """One to three answers of the form the task has."""
    count = rng.randrange(1, 4)
    if task == "passage_retrieval_en":
        return [f"Paragraph {rng.choice((3, 14, 30))}" for _ in range(count)]
    if task == "passage_count":
        return [str(rng.choice((3, 14))) for _ in range(count)]
    if task == "trec":
        return rng.sample(CLASSES, count)
    pool = [
        "Paris",
        "The Berlin wall",
        "Rome, Paris",
        "x = 1",
        "y = 2",
        "Zürich naïve café",
        "パリ",
    ]
    return rng.sample(pool, count)


@pytest.mark.parametrize("name", LONGBENCH_TASKS)
def test_longbench(name: str) -> None:
    package = {"rouge_score": "rouge"}.get(METRICS[name])
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed (lm_eval[longbench])")
    task = longbench_tasks.definition(name)
    # The plain function of one answer and one reference, not the wrapper that we call.
    single = getattr(longbench_tasks.metrics_module(), METRICS[name])
    rng = random.Random(name)
    scores = []
    for answer in answers(name):
        row = {"answers": references(name, rng), "all_classes": CLASSES}
        shown = answer
        if name in RULE_OF_FIRST_LINE:
            shown = shown.lstrip("\n").split("\n")[0]
        if METRICS[name] != "code_sim_score":
            shown = shown.strip()  # as lm-eval does; it matters to no metric but the code one
        expected = max(single(shown, ref, all_classes=CLASSES) for ref in row["answers"])
        found = longbench_tasks.score_answer(task, row, answer)
        assert found == pytest.approx(expected, abs=1e-12), (answer, row)
        scores.append(found)
    assert len(scores) >= 200 and min(scores) == 0.0 and max(scores) > 0.3
    assert scores[0] == 0.0  # the empty answer


@pytest.mark.parametrize("name", RULER_TASKS)
def test_ruler(name: str) -> None:
    task = ruler_tasks.definition(name)
    common = importlib.import_module("lm_eval.tasks.ruler.common_utils")
    rng = random.Random(name)
    scores = []
    for answer in answers(name):
        refs = references("hotpotqa", rng)
        found = ruler_tasks.score_answer(task, refs, answer)
        [clean] = common.postprocess_pred([answer])
        if name in ("qa_1", "qa_2"):
            expected = max(common.string_match_part([clean], [[ref]]) for ref in refs)
            # RULER's definition, in words: any reference is enough.
            assert expected == float(any(ref.lower() in clean.lower() for ref in refs))
            assert (found > 0) == (common.string_match_part([clean], [refs]) > 0)
        else:
            expected = common.string_match_all([clean], [refs])
        assert found == expected, (answer, refs)
        scores.append(found)
    assert len(scores) >= 200 and min(scores) == 0.0 == scores[0] and max(scores) == 1.0


def test_without_optional_packages_the_other_tasks_score_the_same() -> None:
    real: Any = importlib.util.find_spec
    hidden = {"rouge", "fuzzywuzzy", "jieba"}
    with (
        mock.patch.dict(sys.modules),
        mock.patch.object(
            importlib.util, "find_spec", lambda n, *a: None if n in hidden else real(n, *a)
        ),
    ):
        module = longbench_tasks.metrics_module.__wrapped__()
    assert module.qa_f1_score("the Paris", "paris") == 1.0
