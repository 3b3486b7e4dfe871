"""Suite name -> the function that measures one seed of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvquant.config import TaskSpec
from kvquant.errors import unknown
from kvquant.evaluation.base import Context, SuiteResult
from kvquant.evaluation.longbench import run_longbench
from kvquant.evaluation.passkey import run_passkey
from kvquant.evaluation.perplexity import run_perplexity
from kvquant.evaluation.ruler import run_ruler

Runner = Callable[[Context, Any, int], SuiteResult]

SUITES: dict[str, Runner] = {
    "longbench": run_longbench,
    "passkey": run_passkey,
    "perplexity": run_perplexity,
    "ruler": run_ruler,
}


def run_suite(context: Context, spec: TaskSpec, seed: int) -> SuiteResult:
    """Measures one seed of a task.

    Raises:
        UserError: The suite is unknown, or the task does not fit the model.
    """
    if spec.suite not in SUITES:
        raise unknown("suite", spec.suite, SUITES)
    return SUITES[spec.suite](context, spec, seed)
