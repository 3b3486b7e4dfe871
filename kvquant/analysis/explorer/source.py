"""The tables and names from which the explorer's views are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from kvquant.analysis.explorer.values import NOT_ASKED, NOT_MEASURED, Column
from kvquant.analysis.labels import Labels
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.analysis.tables import read_table
from kvquant.study.config import Study


@dataclass(frozen=True)
class Source:
    """The collected tables of a study, with look-ups by model, scheme and task.

    Attributes:
        tables: All tables but that of samples, of all devices.
        samples: The table of samples.
    """

    tables: Tables
    samples: pd.DataFrame

    @property
    def study(self) -> Study:
        """Returns the study."""
        return self.tables.study

    @property
    def labels(self) -> Labels:
        """Returns the names that readers see."""
        return self.tables.labels

    @cached_property
    def one_device(self) -> Tables:
        """Returns the tables with timings of one device each, as figures and claims read them."""
        return self.tables.on_one_device()

    @cached_property
    def evaluations(self) -> dict[tuple[str, str, str], pd.DataFrame]:
        """Returns the seeds of every evaluation, by model, scheme and task."""
        table = self.tables.evaluations
        if table.empty:
            return {}
        keys = ["model", "scheme", "task"]
        return {
            (str(key[0]), str(key[1]), str(key[2])): rows
            for key, rows in table.groupby(keys, sort=False)
        }

    @cached_property
    def tests(self) -> dict[tuple[str, str, str, str], pd.Series]:
        """Returns every comparison with the baseline, by level, model, scheme and task."""
        rows = self.tables.tests
        keys = ("level", "model", "scheme", "task")
        if rows.empty:
            return {}
        return {
            (str(row[keys[0]]), str(row[keys[1]]), str(row[keys[2]]), str(row[keys[3]])): row
            for _, row in rows.iterrows()
        }

    def why_no_evaluation(self, scheme: str, task: str) -> str:
        """Returns why there is no record of a scheme on a task."""
        study = self.study
        if study.evaluates(scheme, task):
            return NOT_MEASURED
        chosen = scheme in (study.evaluation.schemes or study.schemes)
        if not chosen or task not in study.evaluation.tasks.get(scheme, [task]):
            return NOT_ASKED
        return f"cannot run protocol {study.task(task).cache_protocol()}"

    def who(self, model: str | None, scheme: str) -> dict[str, str]:
        """Returns the first cells of a row: model, scheme and family."""
        spec = self.study.schemes.get(scheme.partition(" (")[0])
        return {
            "model": self.labels.model(model) if model else "random weights",
            "scheme": self.labels.scheme(scheme),
            "family": spec.family if spec is not None else "other",
        }

    @property
    def who_columns(self) -> list[Column]:
        """Returns the columns of :meth:`who`; the model's is there if there are several."""
        model = [Column("model", "model", text=True)] if len(self.study.models) > 1 else []
        family = (
            "Ours are this project's schemes, with any datatype; peers are the methods of others."
        )
        return [
            *model,
            Column("scheme", "scheme", text=True),
            Column("family", "family", family, text=True),
        ]


def load(study: Study, folder: Path) -> Source:
    """Reads the collected tables of a study."""
    return Source(load_tables(study, folder), read_table(folder, "samples"))


def has(table: pd.DataFrame, *columns: str) -> bool:
    """Returns whether a collected table has rows, and these columns."""
    return bool(len(table)) and set(columns) <= set(table.columns)
