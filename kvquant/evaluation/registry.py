"""Suite name -> the functions that measure seeds of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvquant.errors import unknown
from kvquant.evaluation.base import Context, Source, SuiteResult
from kvquant.evaluation.generated import Rules, SeedPrompts, answer_seeds
from kvquant.evaluation.longbench import longbench_rules, prepare_longbench
from kvquant.evaluation.passkey import passkey_rules, prepare_passkey
from kvquant.evaluation.perplexity import run_perplexity
from kvquant.evaluation.ruler import prepare_ruler, ruler_rules
from kvquant.study.config import PerplexityTask, TaskSpec


class Answered(NamedTuple):
    """A suite of answers: what it asks, which needs no model, and how it scores."""

    prepare: Callable[[Source, Any, int], SeedPrompts]
    rules: Callable[[Any, Any], Rules]


# Their prompts are prepared once for all schemes, and their seeds may share batches.
ANSWERED: dict[str, Answered] = {
    "longbench": Answered(prepare_longbench, longbench_rules),
    "passkey": Answered(prepare_passkey, passkey_rules),
    "ruler": Answered(prepare_ruler, ruler_rules),
}
# Others measure one seed at a time.
SUITES: dict[str, Callable[[Context, Any, int], SuiteResult]] = {"perplexity": run_perplexity}


def run_suite(
    context: Context, spec: TaskSpec, seeds: Sequence[int], prompts: Sequence[SeedPrompts] = ()
) -> list[SuiteResult]:
    """Measures seeds of a task, in shared batches where the suite can.

    Args:
        context: The model.
        spec: The task.
        seeds: The seeds.
        prompts: What each seed asks, for a suite of answers.

    Raises:
        UserError: The suite is unknown, or the task does not fit the model.
    """
    if spec.suite in SUITES:
        return [SUITES[spec.suite](context, spec, seed) for seed in seeds]
    if spec.suite in ANSWERED and not isinstance(spec, PerplexityTask):
        rules = ANSWERED[spec.suite].rules(spec, context.qm.tokenizer)
        return answer_seeds(context, prompts, rules, spec.batch_size)
    raise unknown("suite", spec.suite, (*ANSWERED, *SUITES))
