"""The tasks of suites that have several, in families: groups that are summarised together.

A family is registered here and nowhere else: the study accepts its tasks, the workflow fetches the
data sets that they read, and the table of families shows its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskFamily:
    """Tasks of one suite that test the same ability.

    Attributes:
        suite: The suite's name.
        name: The family's name, unique in its suite.
        label: The name in tables.
        tasks: The data set that each task reads, by the task's name in the pinned lm-eval package.
        labels: The names of tasks in figures and tables, where they have better ones.
        min_length: Shortest prompt with answer, in tokens, that holds a task of the family.
    """

    suite: str
    name: str
    label: str
    tasks: Mapping[str, str]
    min_length: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


def _essays(*tasks: str) -> dict[str, str]:
    return dict.fromkeys(tasks, "essays")


def _rows(*tasks: str) -> dict[str, str]:
    """LongBench's tasks, each with the data set of its own rows."""
    return {task: f"longbench-{task}" for task in tasks}


_NEEDLES = ("single", "multikey")
# Tests hold the tasks against the pinned lm-eval package.
FAMILIES = (
    TaskFamily(
        "ruler",
        "retrieval",
        "retrieval",
        _essays(
            *("niah_single_1", "niah_single_2", "niah_single_3"),
            *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
            *("niah_multivalue", "niah_multiquery"),
        ),
        labels={
            **{f"niah_{kind}_{n}": f"NIAH {kind} {n}" for kind in _NEEDLES for n in (1, 2, 3)},
            **{"niah_multivalue": "NIAH multivalue", "niah_multiquery": "NIAH multiquery"},
        },
    ),
    # The shortest chain of variables with instruction and answer has 400 tokens.
    TaskFamily(
        "ruler",
        "tracing",
        "multi-hop tracing",
        _essays("vt"),
        min_length=400,
        labels={"vt": "variable tracking"},
    ),
    TaskFamily(
        "ruler",
        "aggregation",
        "aggregation",
        _essays("cwe", "fwe"),
        labels={"cwe": "common words", "fwe": "frequent words"},
    ),
    TaskFamily(
        "ruler",
        "qa",
        "question answering",
        {"qa_1": "squad", "qa_2": "hotpotqa"},
        labels={"qa_1": "QA, SQuAD", "qa_2": "QA, HotpotQA"},
    ),
    TaskFamily(
        "longbench",
        "single-document",
        "single-document QA",
        _rows("narrativeqa", "qasper", "multifieldqa_en"),
        labels={
            "narrativeqa": "NarrativeQA",
            "qasper": "Qasper",
            "multifieldqa_en": "MultiFieldQA-en",
        },
    ),
    TaskFamily(
        "longbench",
        "multi-document",
        "multi-document QA",
        _rows("hotpotqa", "2wikimqa", "musique"),
        labels={"hotpotqa": "HotpotQA", "2wikimqa": "2WikiMultihopQA", "musique": "MuSiQue"},
    ),
    TaskFamily(
        "longbench",
        "summarization",
        "summarization",
        _rows("gov_report", "qmsum", "multi_news"),
        labels={"gov_report": "GovReport", "qmsum": "QMSum", "multi_news": "MultiNews"},
    ),
    TaskFamily(
        "longbench",
        "few-shot",
        "few-shot learning",
        _rows("trec", "triviaqa", "samsum"),
        labels={"trec": "TREC", "triviaqa": "TriviaQA", "samsum": "SAMSum"},
    ),
    TaskFamily(
        "longbench",
        "synthetic",
        "synthetic",
        _rows("passage_retrieval_en", "passage_count"),
        labels={
            "passage_retrieval_en": "PassageRetrieval-en",
            "passage_count": "PassageCount",
        },
    ),
    TaskFamily(
        "longbench",
        "code",
        "code completion",
        _rows("lcc", "repobench-p"),
        labels={"lcc": "LCC", "repobench-p": "RepoBench-P"},
    ),
    # A new family goes above this line.
)


def families(suite: str) -> tuple[TaskFamily, ...]:
    """Returns the families of a suite, in the order of tables."""
    return tuple(family for family in FAMILIES if family.suite == suite)


def task_names(suite: str) -> tuple[str, ...]:
    """Returns every task of a suite's families."""
    return tuple(task for family in families(suite) for task in family.tasks)


def family_of(suite: str, task: str) -> TaskFamily | None:
    """Returns the family of a task; None for a task that the suite does not have."""
    return next((family for family in families(suite) if task in family.tasks), None)


def task_label(suite: str, task: str) -> str:
    """Returns the name of a suite's task in figures and tables."""
    family = family_of(suite, task)
    return task if family is None else family.labels.get(task, task)
