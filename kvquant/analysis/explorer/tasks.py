"""The table of evaluations: a row per model, task and scheme, and per mean of a suite's tasks."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from kvquant.analysis.explorer.source import Source
from kvquant.analysis.explorer.values import (
    NOT_APPLICABLE,
    NOT_MEASURED,
    Cell,
    Column,
    Row,
    Sheet,
    missing,
    number,
    spread,
)
from kvquant.analysis.pareto import bits_of
from kvquant.study.suite import Suite, scored_suites
from kvquant.study.tasks import SUITES

BASELINE = "baseline"
LOSS_HELP = (
    "Loss against the unquantized cache, in the unit of the metric: above 0 is worse. Behind it "
    "the 95 % interval of pairs of prompts or windows, as in the paper's tables."
)
VERDICT_HELP = (
    "Of the paired test with Holm's correction: worse or better, also where that is within the "
    "margin of equivalence; equivalent; identical; inconclusive; not informative where the "
    "unquantized cache itself is near chance."
)


def loss(test: pd.Series | None, *, is_baseline: bool, why: str, note: bool = True) -> Cell:
    """Returns the loss of a comparison with its interval and verdict; above 0 is worse.

    Args:
        test: The comparison; None for none.
        is_baseline: Whether the scheme is what others are compared with.
        why: The reason if there is none.
        note: Whether the verdict stands behind it.
    """
    if is_baseline:
        return {"v": 0, "t": BASELINE} if note else 0
    if test is None:
        return missing(why)
    value, low, high = test.difference, test.sample_ci_low, test.sample_ci_high
    if test.higher_is_better:
        value, low, high = -value, -high, -low
    return spread(value, low, high, why, str(test.verdict) if note else "")


def _compared(
    source: Source, test: pd.Series | None, is_baseline: bool, why: str
) -> dict[str, Cell]:
    """Returns the cells of a comparison."""
    none = NOT_APPLICABLE if is_baseline else why
    cells: dict[str, Cell] = {"loss": loss(test, is_baseline=is_baseline, why=why, note=False)}
    cells["verdict"] = BASELINE if is_baseline else missing(why)
    if test is not None:
        cells["verdict"] = str(test.verdict)
    for name, column in (("margin", "margin"), ("p", "p_sample_holm")):
        cells[name] = missing(none) if test is None else number(test[column], NOT_APPLICABLE)
    return cells


def _task_row(source: Source, model: str, task: str, scheme: str) -> Row:
    """Returns the row of a scheme on a task, with its reasons where it was not measured."""
    study = source.study
    spec, is_baseline = study.task(task), scheme == study.baseline
    seeds = source.evaluations.get((model, scheme, task))
    why = source.why_no_evaluation(scheme, task)
    cells: dict[str, Cell] = {
        **source.who(model, scheme),
        "suite": SUITES[spec.suite].label,
        "task": source.labels.task(task),
        "protocol": spec.cache_protocol(),
        "bits": missing(why) if seeds is None else number(bits_of(seeds)),
        "value": missing(why) if seeds is None else number(seeds["value"].mean()),
        "seeds": f"{0 if seeds is None else len(seeds)} of {len(study.seeds)}",
        "samples": missing(why) if seeds is None else number(seeds["samples"].sum()),
        "each": missing(why),
    }
    if seeds is not None:
        whole = len(seeds) == len(study.seeds)
        cells["each"] = "; ".join(
            f"{value:.5g}" if whole else f"{seed}: {value:.5g}"
            for seed, value in zip(seeds.seed, seeds.value, strict=True)
        )
    for name in ("kl", "top1_agreement"):
        there = seeds is not None and name in seeds and bool(seeds[name].notna().any())
        mean = seeds[name].mean() if seeds is not None and there else None
        applies = SUITES[spec.suite].metric_type == "likelihood"
        cells[name] = number(mean, why if applies else NOT_APPLICABLE)
    test = source.tests.get(("task", model, scheme, task))
    base = source.evaluations.get((model, study.baseline, task))
    cells["baseline"] = missing(NOT_MEASURED) if base is None else number(base["value"].mean())
    cells |= _compared(source, test, is_baseline and seeds is not None, why)
    cell = ("eval", model, scheme, task)
    return Row(cells, scheme, model, spec.suite, cells["bits"], cell)


def _mean_row(source: Source, model: str, suite: Suite, scheme: str, test: pd.Series) -> Row:
    """Returns the row of a scheme's mean over the tasks of a suite."""
    rows = source.tables.evaluations
    mine = rows[(rows.model == model) & (rows.scheme == scheme) & (rows.suite == suite.name)]
    tasks = mine["task"].nunique()
    cells: dict[str, Cell] = {
        **source.who(model, scheme),
        "suite": suite.label,
        "task": f"mean of {tasks} tasks",
        "protocol": ", ".join(sorted(set(mine["protocol"]))),
        "bits": number(bits_of(mine)),
        "value": number(test["mean"]),
        "baseline": number(test["baseline_mean"]),
        "seeds": f"{mine['seed'].nunique()} of {len(source.study.seeds)}",
        "samples": number(mine["samples"].sum()),
        "each": missing(NOT_APPLICABLE),
        "kl": missing(NOT_APPLICABLE),
        "top1_agreement": missing(NOT_APPLICABLE),
        **_compared(source, test, is_baseline=False, why=NOT_MEASURED),
    }
    return Row(cells, scheme, model, suite.name, cells["bits"])


def _rows(source: Source) -> Iterator[Row]:
    study = source.study
    for model in study.models:
        for task in study.tasks:
            for scheme in study.schemes:
                there = (model, scheme, task) in source.evaluations
                if there or study.evaluates(scheme, task):
                    yield _task_row(source, model, task, scheme)
        for name in scored_suites():
            for scheme in study.schemes:
                test = source.tests.get(("suite", model, scheme, name))
                if test is not None:
                    yield _mean_row(source, model, SUITES[name], scheme, test)


def sheet(source: Source) -> Sheet:
    """Returns the table: every evaluation that the study asks for, measured or not."""
    return Sheet(
        [
            *source.who_columns,
            Column("task", "task", text=True),
            Column("bits", "bits per element", "Of bytes allocated in this task.", digits=2),
            Column("loss", "loss [95 % interval]", LOSS_HELP, digits=2, signed=True),
            Column("verdict", "verdict", VERDICT_HELP, text=True),
            Column("value", "score", "Mean over seeds, in the task's own metric.", digits=2),
            Column("baseline", "16-bit cache", "The same of the unquantized cache.", digits=2),
            Column(
                "protocol",
                "protocol",
                "A: the prompt attends in full precision and later tokens read the quantized "
                "cache, as in serving. B: every token reads quantized keys and values.",
                text=True,
            ),
            Column("suite", "suite", text=True),
            Column("margin", "margin", "Of equivalence, in the unit of the metric.", digits=2),
            Column("p", "p", "Of the paired test, after Holm's correction in its family."),
            Column("kl", "KL, nats", "Divergence of the next token from the unquantized cache's."),
            Column(
                "top1_agreement",
                "same top-1 token",
                "Share of tokens at which the most probable next token is the same.",
                digits=3,
            ),
            Column("seeds", "seeds", "Measured, of those that the study asks for.", text=True),
            Column("samples", "prompts or windows", "Of all seeds together."),
            Column(
                "each", "by seed", "The score of each seed, in the order of the study.", text=True
            ),
        ],
        list(_rows(source)),
    )
