"""Suite name -> the functions that measure seeds of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvquant.config import TaskSpec
from kvquant.errors import unknown
from kvquant.evaluation.base import Context, SuiteResult
from kvquant.evaluation.generated import Prepared, answer_seeds
from kvquant.evaluation.longbench import prepare_longbench
from kvquant.evaluation.passkey import prepare_passkey
from kvquant.evaluation.perplexity import run_perplexity
from kvquant.evaluation.ruler import prepare_ruler

# Suites of answers say what to ask; their seeds may share batches.
ANSWERED: dict[str, Callable[[Context, Any, int], Prepared]] = {
    "longbench": prepare_longbench,
    "passkey": prepare_passkey,
    "ruler": prepare_ruler,
}
# Others measure one seed at a time.
SUITES: dict[str, Callable[[Context, Any, int], SuiteResult]] = {"perplexity": run_perplexity}


def run_suite(context: Context, spec: TaskSpec, seeds: Sequence[int]) -> list[SuiteResult]:
    """Measures seeds of a task, in shared batches where the suite can.

    Raises:
        UserError: The suite is unknown, or the task does not fit the model.
    """
    if spec.suite in ANSWERED:
        prepare = ANSWERED[spec.suite]
        return answer_seeds(context, [prepare(context, spec, seed) for seed in seeds])
    if spec.suite in SUITES:
        return [SUITES[spec.suite](context, spec, seed) for seed in seeds]
    raise unknown("suite", spec.suite, (*ANSWERED, *SUITES))
