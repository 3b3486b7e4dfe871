"""The tables of a study, as claims and LaTeX tables read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from kvquant.analysis.labels import Labels, labels_of
from kvquant.analysis.tables import read_table
from kvquant.analysis.timed_on import one_device
from kvquant.study.config import Study


@dataclass(frozen=True)
class Tables:
    """The collected tables of a study."""

    study: Study
    evaluations: pd.DataFrame
    perf: pd.DataFrame
    energy: pd.DataFrame
    tests: pd.DataFrame
    pareto: pd.DataFrame
    append: pd.DataFrame
    jobs: pd.DataFrame
    kernels: pd.DataFrame = field(default_factory=pd.DataFrame)

    @cached_property
    def labels(self) -> Labels:
        """Returns the names of the study's models, schemes, tasks and workloads."""
        return labels_of(self.study)

    @property
    def on_gpu(self) -> bool:
        """Returns whether timings come from a GPU."""
        return self.study.gpus > 0

    def devices(self) -> list[str]:
        """Returns the names of the devices on which something was timed."""
        timed = (self.perf, self.energy, self.append, self.jobs, self.kernels)
        names = [t["device"] for t in timed if "device" in t]
        return list(dict.fromkeys(name for each in names for name in each))

    def on_one_device(self) -> Tables:
        """Returns the tables with the timings of one device each, which claims and numbers read."""
        names = ("perf", "energy", "append", "jobs", "kernels")
        return replace(
            self, **{name: one_device(self.study, getattr(self, name)) for name in names}
        )

    def of(self, model: str) -> Tables:
        """Returns the rows of one model; tables without a model stay as they are."""
        names = ("evaluations", "perf", "energy", "tests", "pareto")
        tables = {name: getattr(self, name) for name in names}
        return replace(
            self, **{n: t[t["model"] == model] if "model" in t else t for n, t in tables.items()}
        )

    def not_evaluated(
        self, suite: str, schemes: Iterable[str], protocol: str | None = None
    ) -> list[str]:
        """Returns the names of the tasks of a suite that some schemes have no results of yet.

        Args:
            suite: The suite.
            schemes: The schemes, of which each counts on the tasks that the study asks of it.
            protocol: Of the tasks; None: any.
        """
        there = set(zip(self.evaluations["scheme"], self.evaluations["task"], strict=True))
        return [
            self.labels.task(task)
            for task, spec in self.study.tasks.items()
            if spec.suite == suite
            and protocol in (None, getattr(spec, "protocol", None))
            and any(self.study.evaluates(s, task) and (s, task) not in there for s in schemes)
        ]

    def headline_tests(self, suite: str) -> pd.DataFrame:
        """Returns the comparisons of the headline scheme on the tasks of a suite."""
        if "level" not in self.tests:
            return self.tests
        rows = self.tests[(self.tests.level == "task") & (self.tests.suite == suite)]
        return rows[rows.scheme == self.study.headline]

    def job_sides(self, case: str) -> tuple[pd.Series | None, pd.DataFrame]:
        """Returns our row of a case of whole jobs, and those of fp16 caches with 16-bit attention.

        Ours is that of the headline scheme, or in a case without it of the first quantized cache.
        """
        rows = self.jobs[(self.jobs.case == case) & (self.jobs.status == "ok")]
        schemes = self.study.schemes
        quantized = [s for s in self.study.job_cases()[case].schemes if schemes[s].quantizes]
        chosen = [s for s in quantized if s == self.study.headline] or quantized[:1]
        ours = rows[rows.scheme.isin(chosen)]
        base = rows[rows.scheme.isin([name for name, spec in schemes.items() if spec.exact])]
        return (ours.iloc[0] if len(ours) else None), base

    def headline_perf(self) -> pd.DataFrame:
        """Returns the throughput rows of the headline scheme."""
        return self.perf[self.perf["scheme"] == self.study.headline]


def load_tables(study: Study, folder: Path, *, accuracy_only: bool = False) -> Tables:
    """Reads all tables of a study, or those of evaluations alone, where the others are empty."""
    if accuracy_only:
        none = pd.DataFrame()
        evaluations, tests = read_table(folder, "eval"), read_table(folder, "tests")
        return Tables(study, evaluations, none, none, tests, none, none, none)
    names = ("eval", "perf", "energy", "tests", "pareto")
    evaluations, perf, energy, tests, pareto = (read_table(folder, name) for name in names)
    append = read_table(folder, "append") if study.append else pd.DataFrame()
    jobs = read_table(folder, "jobs") if study.jobs else pd.DataFrame()
    kernels = read_table(folder, "kernels") if study.kernels else pd.DataFrame()
    return Tables(study, evaluations, perf, energy, tests, pareto, append, jobs, kernels)
