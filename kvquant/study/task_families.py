"""The tasks of suites that have several, in families: groups that are summarised together.

A family is registered here and nowhere else: the study accepts its tasks, the workflow fetches the
data sets that they read, and the table of families shows its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskFamily:
    """Tasks of one suite that test the same ability.

    Attributes:
        suite: The suite's name.
        name: The family's name, unique in its suite.
        label: The name in tables.
        tasks: The data set that each task reads, by the task's name in the pinned lm-eval package.
        min_length: Shortest prompt with answer, in tokens, that holds a task of the family.
    """

    suite: str
    name: str
    label: str
    tasks: Mapping[str, str]
    min_length: int = 0


def _essays(*tasks: str) -> dict[str, str]:
    return dict.fromkeys(tasks, "essays")


def _rows(*tasks: str) -> dict[str, str]:
    """LongBench's tasks, each with the data set of its own rows."""
    return {task: f"longbench-{task}" for task in tasks}


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
    ),
    # The shortest chain of variables with instruction and answer has 400 tokens.
    TaskFamily("ruler", "tracing", "multi-hop tracing", _essays("vt"), min_length=400),
    TaskFamily("ruler", "aggregation", "aggregation", _essays("cwe", "fwe")),
    TaskFamily("ruler", "qa", "question answering", {"qa_1": "squad", "qa_2": "hotpotqa"}),
    TaskFamily(
        "longbench",
        "single-document",
        "single-document QA",
        _rows("narrativeqa", "qasper", "multifieldqa_en"),
    ),
    TaskFamily(
        "longbench",
        "multi-document",
        "multi-document QA",
        _rows("hotpotqa", "2wikimqa", "musique"),
    ),
    TaskFamily(
        "longbench", "summarization", "summarization", _rows("gov_report", "qmsum", "multi_news")
    ),
    TaskFamily("longbench", "few-shot", "few-shot learning", _rows("trec", "triviaqa", "samsum")),
    TaskFamily(
        "longbench", "synthetic", "synthetic", _rows("passage_retrieval_en", "passage_count")
    ),
    TaskFamily("longbench", "code", "code completion", _rows("lcc", "repobench-p")),
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
