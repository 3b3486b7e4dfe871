"""Numbers of each scheme: its bits, its loss, the suites and every task, with verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from kvquant.analysis.numbers.number import Number, fact, measured, spread
from kvquant.analysis.pareto import bits_of
from kvquant.analysis.study_tables import Tables
from kvquant.analysis.suite_tables import suite_test
from kvquant.study.sample_types import KL_PERCENTILES
from kvquant.study.suite import likelihood_suites, scored_suites

METRICS = {"kl": 4, **dict.fromkeys(KL_PERCENTILES, 3)}  # digits


def numbers(t: Tables) -> Iterator[Number]:
    """Yields the numbers of every scheme on every model."""
    several = len(t.study.models) > 1
    groups = dict(iter(t.evaluations.groupby(["model", "scheme"], sort=False)))
    tests: dict[tuple[str, str, str], Any] = {}
    if len(t.tests):
        of_tasks = t.tests[t.tests.level == "task"]
        tests = {(row.model, row.scheme, row.task): row for row in of_tasks.itertuples()}
    none = t.evaluations[:0]
    for row in t.pareto.to_dict("records"):
        model, scheme = str(row["model"]), str(row["scheme"])
        mine = groups.get((model, scheme), none)
        base = groups.get((model, t.study.baseline), none)
        prefix = f"{model}.{scheme}" if several else scheme
        for found in _of_scheme(t, row, mine, base, tests):
            yield found.within(prefix)


def _of_scheme(
    t: Tables,
    row: dict[str, object],
    mine: pd.DataFrame,
    base: pd.DataFrame,
    tests: dict[tuple[str, str, str], Any],
) -> Iterator[Number]:
    model, scheme = str(row["model"]), str(row["scheme"])
    yield fact("name", t.labels.scheme(scheme))
    quality = mine[mine.task == row["quality_task"]]
    yield from measured("bits", bits_of(quality), 2, quality)
    for suite in scored_suites():
        rows, against = (side[side.suite == suite] for side in (mine, base))
        yield from measured(suite, _float(row[suite]), 1, rows)
        change = _float(row[f"{suite}_change"])
        if scheme != t.study.baseline and not pd.isna(change):
            yield from measured(f"{suite}-change", change, 1, rows, against)
            test = suite_test(t, suite, model, scheme)
            yield fact(f"{suite}-verdict", "-" if test is None else test.verdict, rows, against)
    bases = dict(iter(base.groupby("task", sort=False)))
    for task, rows in mine.groupby("task", sort=False):
        test = None if scheme == t.study.baseline else tests.get((model, scheme, str(task)))
        yield from _of_task(str(task), rows, bases.get(task, base[:0]), test)


def _of_task(
    task: str, mine: pd.DataFrame, base: pd.DataFrame, test: Any | None
) -> Iterator[Number]:
    """Yields a task's numbers: mean, bits, and the change with its interval and verdict."""
    likely = str(mine.suite.iloc[0]) in likelihood_suites()
    digits = 2 if likely else 1
    yield from measured(task, mine.value.mean(), digits, mine)
    yield from measured(f"{task}-bits", bits_of(mine), 2, mine)
    if likely:
        for metric, places in METRICS.items():
            if metric in mine:
                key = f"{task}-{metric.replace('_', '-')}"
                yield from measured(key, mine[metric].mean(), places, mine)
        if "top1_agreement" in mine:
            yield from measured(f"{task}-top1", 100 * mine.top1_agreement.mean(), 1, mine)
    if test is not None:
        values = (test.difference, test.sample_ci_low, test.sample_ci_high)
        yield from spread(f"{task}-change", values, digits, mine, base)
        yield fact(f"{task}-verdict", test.verdict, mine, base)


def _float(value: object) -> float:
    return float("nan") if value is None or pd.isna(value) else float(str(value))
