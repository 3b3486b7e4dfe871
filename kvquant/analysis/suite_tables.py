"""The paper's accuracy tables: one per suite, one of families, and a summary with verdicts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from kvquant.analysis.booktabs import Latex, booktabs, number, p_value, signed
from kvquant.analysis.pareto import bits_of, first_task
from kvquant.analysis.study_tables import Tables
from kvquant.study.config import Study
from kvquant.study.suite import likelihood_suites, scored_suites
from kvquant.study.task_families import families
from kvquant.study.tasks import SUITES

# Shown behind a score; the captions of the paper explain them.
MARKS = {
    "identical": r"$=$",
    "equivalent": r"$\approx$",
    "worse": r"$\downarrow$",
    "better": r"$\uparrow$",
    "worse (within margin)": r"$\searrow$",
    "better (within margin)": r"$\nearrow$",
    "not informative": r"$\circ$",
}


def kept_tokens(study: Study, scheme: str) -> str:
    """Returns the tokens per sequence that a scheme keeps in 16 bits: the first + the latest ones.

    What does not fill a block or a group comes on top with every scheme.
    """
    spec = study.schemes[scheme]
    if not spec.quantizes:
        return "all"
    return f"{getattr(spec, 'sinks', 0)} + {getattr(spec, 'residual', 0)}"


def suite_name(t: Tables, suite: str) -> str:
    """Returns a suite's label, with the number of rows where the data is not complete.

    An example is "LongBench subset (n rows)".
    """
    label = SUITES[suite].label
    tasks = t.evaluations[t.evaluations.suite == suite].drop_duplicates("task")
    rows, official = tasks.rows_available, tasks.rows_official
    if (rows >= official).all() or rows.isna().all():
        return label
    return f"{label} subset ({int(rows.sum())} rows)"


def _caches(t: Tables) -> Iterator[tuple[str, str, dict[str, str], pd.Series]]:
    """Yields model, scheme and first columns of each row, and which results belong to it.

    A scheme that is timed only has no row.
    """
    several = len(t.study.models) > 1
    for model in t.study.models:
        for scheme in t.study.schemes:
            first = {"model": t.labels.model(model)} if several else {}
            chosen = (t.evaluations.model == model) & (t.evaluations.scheme == scheme)
            if chosen.any():
                yield model, scheme, first | {"scheme": t.labels.scheme(scheme)}, chosen


def _sides(t: Tables, model: str, task: str, scheme: str) -> dict[str, str]:
    """Returns the first columns of a row: the model where there are several, task and scheme."""
    first = {"model": t.labels.model(model)} if len(t.study.models) > 1 else {}
    return first | {"task": t.labels.task(task), "scheme": t.labels.scheme(scheme)}


def _test(t: Tables, level: str, task: str, model: str, scheme: str) -> pd.Series | None:
    if t.tests.empty:  # nothing is compared with the unquantized cache
        return None
    rows = t.tests[
        (t.tests.level == level)
        & (t.tests.task == task)
        & (t.tests.model == model)
        & (t.tests.scheme == scheme)
    ]
    return rows.iloc[0] if len(rows) else None


def suite_test(t: Tables, suite: str, model: str, scheme: str) -> pd.Series | None:
    """Returns the test of a suite's mean, or of its only task."""
    tasks = t.evaluations[t.evaluations.suite == suite].task.unique()
    if len(tasks) == 1:
        return _test(t, "task", tasks[0], model, scheme)
    return _test(t, "suite", suite, model, scheme)


def marked(value: float, test: pd.Series | None, digits: int = 1) -> Latex:
    """Returns a number and the mark of its verdict, in a box of one width to align digits."""
    mark = MARKS.get(str(test.verdict), "") if test is not None else ""
    return Latex(rf"{number(value, digits)}\makebox[0.9em][l]{{{mark}}}")


def likelihoods(t: Tables, suite: str) -> str:
    """Builds the table of a suite of likelihoods: value, change, tests and KL divergence."""
    values = t.evaluations[t.evaluations.suite == suite]
    rows = []
    for (model, task), group in values.groupby(["model", "task"], sort=False):
        for scheme, mine in group.groupby("scheme", sort=False):
            test = _test(t, "task", str(task), str(model), str(scheme))
            row = _sides(t, str(model), str(task), str(scheme))
            row["16-bit"] = kept_tokens(t.study, str(scheme))
            row["bits"] = number(bits_of(mine))
            row[SUITES[suite].label] = number(mine.value.mean())
            row["KL, nats"] = number(mine.kl.mean(), 4)
            if test is None:
                row |= dict.fromkeys(("change [95 % CI]", "margin", "p (Holm)", "verdict"), "-")
            else:
                low, high = test.sample_ci_low, test.sample_ci_high
                row["change [95 % CI]"] = signed(test.difference, low, high)
                row["margin"] = number(test.margin)
                row["p (Holm)"] = p_value(test.p_sample_holm)
                row["verdict"] = test.verdict
            rows.append(row)
    table = pd.DataFrame(rows, dtype=object)  # keeps `Latex` cells
    return booktabs(table, "l" * (table.shape[1] - 8) + "rrrrrrrl", size="scriptsize", tight=True)


# Further columns of the table of divergences: metric, head, format.
_TAILS = (
    ("kl_p99", "KL, 99th percentile", "{:.3f}"),
    ("kl_p999", "KL, 99.9th percentile", "{:.3f}"),
    ("top1_agreement", "same top-1 token", "{:.2%}"),
)


def divergences(t: Tables) -> str:
    """Builds the table of divergences: mean, percentiles and top-1 agreement by task and scheme.

    Seeds that were measured before there were percentiles have none. Where some seeds have none
    there is no mean over seeds.
    """
    rows = []
    measured = t.evaluations[t.evaluations.kl.notna()]
    for (model, task), group in measured.groupby(["model", "task"], sort=False):
        for scheme, mine in group.groupby("scheme", sort=False):
            row = _sides(t, str(model), str(task), str(scheme))
            row["bits"] = number(bits_of(mine))
            row["KL, mean"] = number(mine.kl.mean(), 4)
            for name, head, form in _TAILS:
                mean = mine[name].mean(skipna=False)
                row[head] = "-" if np.isnan(mean) else form.format(mean).replace("%", " %")
            rows.append(row)
    table = pd.DataFrame(rows, dtype=object)
    return booktabs(table, "l" * (table.shape[1] - 5) + "rrrrr", size="scriptsize", tight=True)


def scores(t: Tables, suite: str) -> str:
    """Builds the table of a suite of scores: schemes by tasks and their mean, with verdicts."""
    names = _columns(t, suite)
    rows = []
    for model, scheme, row, chosen in _caches(t):
        mine = t.evaluations[chosen & (t.evaluations.suite == suite)]
        if not len(mine):
            continue
        # an unfinished study lacks some, and then has no mean of all
        means = mine.groupby("task", sort=False)["value"].mean().reindex(list(names))
        cells: dict[str, str] = dict(row)
        for task, name in names.items():
            cells[name] = marked(means[task], _test(t, "task", task, model, scheme))
        if len(names) > 1:
            mean = means.mean(skipna=False)
            cells["mean"] = marked(mean, suite_test(t, suite, model, scheme))
        rows.append(cells)
    table = pd.DataFrame(rows, dtype=object)  # keeps `Latex` cells
    labels = table.shape[1] - len(names) - (len(names) > 1)
    columns = "l" * labels + "r" * (table.shape[1] - labels)
    return booktabs(table, columns, size="scriptsize", rotate=len(names) > 6, tight=True)


def _columns(t: Tables, suite: str) -> dict[str, str]:
    """Returns the head of each task's column, with the rows where the data has a number of them."""
    mine = t.evaluations[t.evaluations.suite == suite].drop_duplicates("task")
    heads = {}
    for task, rows in zip(mine.task.astype(str), mine.rows_available, strict=True):
        head = t.study.task(task).column(t.labels.task(task))
        heads[task] = head if np.isnan(rows) else f"{head} ({int(rows)})"
    return heads


def family_means(t: Tables) -> str:
    """Builds the table of families: schemes by families of tasks, of every suite that has some."""
    tasks: dict[str, list[str]] = {}
    for suite in t.evaluations.suite.unique():
        for family in families(suite):
            mine = [
                name
                for name, task in t.study.tasks.items()
                if task.suite == suite and getattr(task, "task", None) in family.tasks
            ]
            if mine:
                tasks[f"{SUITES[suite].label} {family.label}"] = mine
    rows = []
    for _, _, row, chosen in _caches(t):
        means = t.evaluations[chosen].groupby("task", sort=False)["value"].mean()
        cells: dict[str, str] = dict(row)
        for head, names in tasks.items():
            # an unfinished study lacks some tasks, and then has no mean of the family
            cells[head] = number(means.reindex(names).mean(skipna=False), 1)
        rows.append(cells)
    table = pd.DataFrame(rows, dtype=object)
    labels = table.shape[1] - len(tasks)
    columns = "l" * labels + "r" * len(tasks)
    return booktabs(table, columns, size="scriptsize", rotate=True, tight=True)


def summary(t: Tables) -> str:
    """Builds the summary: bits, perplexity, KL divergence and suites' means, with verdicts."""
    suites = [s for s in scored_suites() if (t.evaluations.suite == s).any()]
    first = first_task(t.study, t.evaluations, *likelihood_suites())
    rows = []
    for model, scheme, row, _ in _caches(t):
        front = t.pareto[(t.pareto.model == model) & (t.pareto.scheme == scheme)].iloc[0]
        cells: dict[str, str] = dict(row)
        cells["16-bit"] = kept_tokens(t.study, scheme)
        cells["bits"] = number(front.bits_per_element)
        if first is not None:
            suite = SUITES[t.study.tasks[first].suite]
            value, test = front[suite.name], _test(t, "task", first, model, scheme)
            cells[suite.label] = marked(value, test, digits=2)
            if not np.isnan(front.kl):
                cells["KL, nats"] = number(front.kl, 4)
        for name in suites:
            cells[suite_name(t, name)] = marked(front[name], suite_test(t, name, model, scheme))
        rows.append(cells)
    table = pd.DataFrame(rows, dtype=object).fillna("-")
    labels = 1 + (len(t.study.models) > 1)
    return booktabs(table, "l" * labels + "r" * (table.shape[1] - labels))
