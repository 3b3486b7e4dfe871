"""The code of the suites, imported when a suite is measured (:mod:`kvquant.study.suite`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from kvquant.errors import unknown
from kvquant.evaluation.base import Context, SuiteResult
from kvquant.evaluation.generated import Answered, SeedPrompts, answer_seeds
from kvquant.study.digests import asks_prompts
from kvquant.study.dotted import load
from kvquant.study.tasks import SUITES, TaskSpec


def answered(suite: str) -> Answered:
    """Returns the code of a suite whose answers are generated.

    Raises:
        UserError: There is no such suite.
    """
    asking = [name for name, known in SUITES.items() if known.asks_prompts]
    if suite not in asking:
        raise unknown("suite", suite, asking)
    return cast(Answered, load(SUITES[suite].implementation))


def run_suite(
    context: Context, spec: TaskSpec, seeds: Sequence[int], prompts: Sequence[SeedPrompts] = ()
) -> list[SuiteResult]:
    """Measures seeds of a task, in shared batches where the suite can.

    Args:
        context: The model.
        spec: The task.
        seeds: The seeds.
        prompts: The prompts of each seed, for a suite whose answers are generated.

    Raises:
        UserError: The task does not fit the model.
    """
    if not asks_prompts(spec):
        measure = load(SUITES[spec.suite].implementation)
        return [measure(context, spec, seed) for seed in seeds]
    rules = answered(spec.suite).rules(spec, context.qm.tokenizer)
    return answer_seeds(context, prompts, rules, spec.batch_size)
