"""The loss of allocated codes over that of every other scheme, paired by seed."""

from __future__ import annotations

from collections.abc import Iterator

from kvquant.analysis.loss_ratio import loss_ratio
from kvquant.analysis.numbers.number import Number, fact, spread
from kvquant.analysis.study_tables import Tables
from kvquant.study.schemes import AllocatedScheme
from kvquant.study.suite import likelihood_suites


def numbers(t: Tables) -> Iterator[Number]:
    """Yields SCHEME.over.OTHER.TASK, with its interval, for tasks of likelihood."""
    several = len(t.study.models) > 1
    allocated = [n for n, s in t.study.schemes.items() if isinstance(s, AllocatedScheme)]
    likely = t.evaluations[t.evaluations.suite.isin(likelihood_suites())]
    for (model, task), rows in likely.groupby(["model", "task"], sort=False):
        there = list(rows.scheme.unique())
        for ours in (name for name in allocated if name in there):
            for theirs in there:
                if theirs in (ours, t.study.baseline):
                    continue
                found = loss_ratio(rows, ours, theirs, t.study.baseline, t.study.statistics.alpha)
                if found is None:
                    continue
                used = rows[rows.scheme.isin([ours, theirs, t.study.baseline])]
                key = f"{ours}.over.{theirs}.{task}"
                values = (found.mean, found.low, found.high)
                for number in (*spread(key, values, 2, used), fact(f"{key}-n", found.seeds, used)):
                    yield number.within(str(model) if several else "")
