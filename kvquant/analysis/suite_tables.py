"""The paper's accuracy tables: one a suite, and a summary with the verdict of every suite.

Each is written for every study, so that the paper can always be compiled; where a study has no task
of a suite, the table says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from kvquant.analysis.booktabs import HEAD, Latex, booktabs, number, p_value, signed
from kvquant.analysis.pareto import SCORED
from kvquant.analysis.study_tables import Tables
from kvquant.study.config import PasskeyTask, Study

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
    """Tokens of a sequence that a scheme keeps in 16 bits: the first + the most recent ones.

    What does not fill a block or a group comes on top with every scheme.
    """
    spec = study.schemes[scheme]
    if not spec.quantizes:
        return "all"
    return f"{getattr(spec, 'sinks', 0)} + {getattr(spec, 'residual', 0)}"


def longbench_name(t: Tables) -> str:
    """LongBench's name in tables, with the number of rows where official rows are missing."""
    tasks = t.evaluations[t.evaluations.suite == "longbench"].drop_duplicates("task")
    if not len(tasks) or (tasks.rows_available >= tasks.rows_official).all():
        return "LongBench"
    return f"LongBench subset ({int(tasks.rows_available.sum())} rows)"


def missing(what: str) -> str:
    """Stands where a study has nothing to show."""
    return f"{HEAD}This study has no {what} task.\n"


def _caches(t: Tables) -> Iterator[tuple[dict[str, str], pd.Series]]:
    """The first columns of a row (the model only where there are several), and which results.

    A scheme that is timed only has no row.
    """
    several = len(t.study.models) > 1
    for model in t.study.models:
        for scheme in t.study.schemes:
            first = {"model": model} if several else {}
            chosen = (t.evaluations.model == model) & (t.evaluations.scheme == scheme)
            if chosen.any():
                yield first | {"scheme": scheme}, chosen


def _test(t: Tables, level: str, task: str, model: str, scheme: str) -> pd.Series | None:
    rows = t.tests[
        (t.tests.level == level)
        & (t.tests.task == task)
        & (t.tests.model == model)
        & (t.tests.scheme == scheme)
    ]
    return rows.iloc[0] if len(rows) else None


def suite_test(t: Tables, suite: str, model: str, scheme: str) -> pd.Series | None:
    """The test of a suite's mean, or of its only task."""
    tasks = t.evaluations[t.evaluations.suite == suite].task.unique()
    if len(tasks) == 1:
        return _test(t, "task", tasks[0], model, scheme)
    return _test(t, "suite", suite, model, scheme)


def marked(value: float, test: pd.Series | None, digits: int = 1) -> Latex:
    """A number and the mark of its verdict, in a box of one width so that digits stay aligned."""
    mark = MARKS.get(str(test.verdict), "") if test is not None else ""
    return Latex(rf"{number(value, digits)}\makebox[0.9em][l]{{{mark}}}")


def perplexity(t: Tables) -> str:
    """Perplexity, its change with interval and tests, and the KL divergence, by task and scheme."""
    values = t.evaluations[t.evaluations.suite == "perplexity"]
    if not len(values):
        return missing("perplexity")
    rows = []
    for (model, task), group in values.groupby(["model", "task"], sort=False):
        for scheme, mine in group.groupby("scheme", sort=False):
            test = _test(t, "task", str(task), str(model), str(scheme))
            row = {"model": model} if len(t.study.models) > 1 else {}
            row |= {"task": task, "scheme": scheme}
            row["16-bit"] = kept_tokens(t.study, str(scheme))
            row["bits"] = number(8 * mine.cache_bytes.sum() / mine.cache_elements.sum())
            row["perplexity"] = number(mine.value.mean())
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


def _scores(t: Tables, suite: str, names: dict[str, str]) -> str:
    """Rows of schemes, columns of tasks and their mean, marked by verdict."""
    rows = []
    for row, chosen in _caches(t):
        mine = t.evaluations[chosen & (t.evaluations.suite == suite)]
        if not len(mine):
            continue
        model, scheme = str(mine.model.iloc[0]), row["scheme"]
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


def _names(t: Tables, suite: str) -> dict[str, str]:
    """Task -> its column's head: the name without the suite's."""
    found = t.evaluations[t.evaluations.suite == suite].task.unique()
    return {str(task): str(task).removeprefix(f"{suite}-") for task in found}


def passkey(t: Tables) -> str:
    """Accuracy by prompt length."""
    names = {}
    for name in _names(t, "passkey"):
        task = t.study.task(name)
        assert isinstance(task, PasskeyTask)
        names[name] = f"{task.length:,} tokens"
    return _scores(t, "passkey", names) if names else missing("passkey")


def ruler(t: Tables) -> str:
    """RULER's tasks and their mean."""
    names = _names(t, "ruler")
    return _scores(t, "ruler", names) if names else missing("RULER")


def longbench(t: Tables) -> str:
    """LongBench's tasks and their mean, with the rows that there are."""
    names = _names(t, "longbench")
    rows = t.evaluations.drop_duplicates("task").set_index("task").rows_available
    shown = {task: f"{name} ({int(rows[task])})" for task, name in names.items()}
    return _scores(t, "longbench", shown) if names else missing("LongBench")


def summary(t: Tables) -> str:
    """Bits, perplexity, KL divergence and the mean of every suite, marked by verdict."""
    heads = {"passkey": "passkey", "ruler": "RULER", "longbench": longbench_name(t)}
    suites = [s for s in SCORED if (t.evaluations.suite == s).any()]
    language = t.evaluations[t.evaluations.suite == "perplexity"]
    tasks = language.task.unique()
    rows = []
    for row, chosen in _caches(t):
        mine = t.evaluations[chosen]
        model, scheme = str(mine.model.iloc[0]), row["scheme"]
        front = t.pareto[(t.pareto.model == model) & (t.pareto.scheme == scheme)].iloc[0]
        cells: dict[str, str] = dict(row)
        cells["16-bit"] = kept_tokens(t.study, scheme)
        cells["bits"] = number(front.bits_per_element)
        if len(tasks):
            first = mine[mine.task == tasks[0]]
            test = _test(t, "task", tasks[0], model, scheme)
            cells["perplexity"] = marked(first.value.mean(), test, digits=2)
            if not np.isnan(first.kl.mean()):
                cells["KL, nats"] = number(first.kl.mean(), 4)
        for suite in suites:
            cells[heads[suite]] = marked(front[suite], suite_test(t, suite, model, scheme))
        rows.append(cells)
    table = pd.DataFrame(rows, dtype=object).fillna("-")
    labels = 1 + (len(t.study.models) > 1)
    return booktabs(table, "l" * labels + "r" * (table.shape[1] - labels))
