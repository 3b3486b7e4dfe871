"""LongBench's tasks as the pinned lm-eval package has them: prompt, length, rules and metric.

All of it is read at run time. Two rules of the official runner follow from lm-eval's files: the
few-shot tasks stop at a newline there, so only the first line of an answer counts; and the few-shot
and code tasks, known by their tags, are texts to be continued and get no chat template.
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
# lm-eval's wrappers of metrics -> the package they need beyond lm-eval's own requirements.
NEEDS = {"get_rouge_with_score": "rouge"}


@dataclass(frozen=True)
class LongBenchDefinition:
    """A task.

    Attributes:
        name: LongBench's name.
        template: Jinja template of the prompt, over `context` and `question`.
        max_new_tokens: Longest answer.
        first_line: Only the first line of an answer counts.
        chat: The prompt is a user's turn of the model's chat template.
        score: lm-eval's metric of (row, [answer]).
    """

    name: str
    template: str
    max_new_tokens: int
    first_line: bool
    chat: bool
    score: Callable[[dict[str, Any], list[str]], dict[str, float]]


def similarity(first: str, second: str) -> int:
    """How alike two texts are, from 0 to 100: the measure of LongBench's code tasks.

    Twice the characters that `difflib` matches over all characters of both, in percent, rounded;
    equal texts have 100, an empty one and another 0.
    """
    if first == second:
        return 100
    if not first or not second:
        return 0
    return round(100 * difflib.SequenceMatcher(None, first, second).ratio())


@functools.cache
def metrics_module() -> ModuleType:
    """lm-eval's metrics of LongBench.

    The module imports three packages at once. jieba serves Chinese tasks only. Of fuzzywuzzy, whose
    licence is the GPL, it asks for one function, which :func:`similarity` is. Where rouge is
    missing, :func:`definition` refuses the tasks that it scores and the rest works.
    """
    stand_ins: dict[str, ModuleType] = {"fuzzywuzzy": ModuleType("fuzzywuzzy")}
    stand_ins["fuzzywuzzy"].fuzz = SimpleNamespace(ratio=similarity)  # type: ignore[attr-defined]
    for package, names in (("jieba", ()), ("rouge", ("Rouge",))):
        if package == "jieba" or importlib.util.find_spec(package) is None:
            stand_ins[package] = ModuleType(package)
            for name in names:
                setattr(stand_ins[package], name, None)
        else:
            importlib.import_module(package)  # for good, not only while the patch below lasts
    with mock.patch.dict(sys.modules, stand_ins):
        return file_module(PACKAGE, "metrics")


def definition(name: str) -> LongBenchDefinition:
    """A task's definition.

    Raises:
        UserError: Unknown name (the nearest known ones are offered), or a package that the metric
            needs is not installed.
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
    """The first line of an answer that is not empty, as the official runner cuts it."""
    return answer.lstrip("\n").split("\n")[0]


def score_answer(task: LongBenchDefinition, row: dict[str, Any], answer: str) -> float:
    """lm-eval's score of an answer, the best over the row's answers, from 0 to 1."""
    shown = first_line(answer) if task.first_line else answer
    return float(task.score(row, [shown])["score"])
