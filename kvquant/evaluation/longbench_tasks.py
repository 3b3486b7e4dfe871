"""LongBench's tasks from the pinned lm-eval package: prompt, length, rules and metric.

They are read at run time. Two rules of the official runner follow from lm-eval's files. Few-shot
tasks stop at a newline, so only the first line of an answer counts. Few-shot and code tasks, known
by their tags, are texts to be continued and use no chat template.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from kvquant.errors import UserError
from kvquant.fetch.lm_eval_files import file_module
from kvquant.fetch.longbench_rows import PACKAGE, task_definition

NO_CHAT_TAGS = {"longbench_fewshot_tasks", "longbench_code_tasks"}
# Maps lm-eval's metric functions to the package that they need beyond lm-eval's requirements.
NEEDS = {"get_rouge_with_score": "rouge"}


@dataclass(frozen=True)
class LongBenchDefinition:
    """Describes a task of LongBench.

    Attributes:
        name: LongBench's name of the task.
        template: Jinja template of the prompt, over `context` and `question`.
        max_new_tokens: Length of the longest answer in tokens.
        first_line: Whether only the first line of an answer counts.
        chat: Whether the prompt is a user's turn of the model's chat template.
        score: lm-eval's metric of (row, [answer]).
    """

    name: str
    template: str
    max_new_tokens: int
    first_line: bool
    chat: bool
    score: Callable[[dict[str, Any], list[str]], dict[str, float]]


def similarity(first: str, second: str) -> int:
    """Returns the similarity of two texts from 0 to 100, the metric of LongBench's code tasks.

    It is twice the number of characters that `difflib` matches, divided by the characters of both
    texts, as a rounded percentage: 100 for equal texts, 0 if only one is empty.
    """
    if first == second:
        return 100
    if not first or not second:
        return 0
    return round(100 * difflib.SequenceMatcher(None, first, second).ratio())


@functools.cache
def metrics_module() -> ModuleType:
    """Imports lm-eval's metrics of LongBench.

    Its file imports three packages. jieba serves only Chinese tasks. From fuzzywuzzy, whose license
    is the GPL, it needs one function, which :func:`similarity` replaces. If rouge is missing,
    :func:`definition` refuses the tasks that it scores, and the others work.
    """
    stand_ins: dict[str, ModuleType] = {"fuzzywuzzy": ModuleType("fuzzywuzzy")}
    stand_ins["fuzzywuzzy"].fuzz = SimpleNamespace(ratio=similarity)  # type: ignore[attr-defined]
    for package, names in (("jieba", ()), ("rouge", ("Rouge",))):
        if package == "jieba" or importlib.util.find_spec(package) is None:
            stand_ins[package] = ModuleType(package)
            for name in names:
                setattr(stand_ins[package], name, None)
        else:
            importlib.import_module(package)  # permanently, not only during the patch below
    with mock.patch.dict(sys.modules, stand_ins):
        return file_module(PACKAGE, "metrics")


def definition(name: str) -> LongBenchDefinition:
    """Returns a task's definition.

    Raises:
        UserError: The name is unknown (the message offers the nearest known ones), or a package
            that the metric needs is not installed.
    """
    raw = task_definition(name)
    scorer = raw["process_results"].rsplit(".", 1)[1]
    package = NEEDS.get(scorer)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"LongBench task '{name}': its metric needs the package '{package}': "
            "pip install 'lm_eval[longbench]'"
        )
    tags = raw["tag"] if isinstance(raw["tag"], list) else [raw["tag"]]
    return LongBenchDefinition(
        name=name,
        template=raw["doc_to_text"],
        max_new_tokens=int(raw["generation_kwargs"]["max_gen_toks"]),
        first_line="\n" in raw["generation_kwargs"]["until"],
        chat=not NO_CHAT_TAGS.intersection(tags),
        score=getattr(metrics_module(), scorer),
    )


def first_line(answer: str) -> str:
    """Returns the first non-empty line of an answer, as the official runner does."""
    return answer.lstrip("\n").split("\n")[0]


def score_answer(task: LongBenchDefinition, row: dict[str, Any], answer: str) -> float:
    """Returns lm-eval's score of an answer from 0 to 1, the best over the row's answers."""
    shown = first_line(answer) if task.first_line else answer
    return float(task.score(row, [shown])["score"])
