"""The whole comparison: rows of what was measured again, and of what was not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kvquant.analysis.reproduction.evaluations import evaluation_rows
from kvquant.analysis.reproduction.pairs import Found, Missing
from kvquant.analysis.reproduction.rows import (
    DIFFERS,
    NOT_RUN,
    REPRODUCED,
    SHOWN,
    UNDECIDED,
    Row,
    Subject,
)
from kvquant.analysis.reproduction.timed import timed_rows
from kvquant.study.config import Study

COLUMNS = [
    *("stage", "model", "scheme", "what", "quantity", "verdict", "published", "own"),
    *("difference", "low", "high", "unit", "difference_unit", "tolerance", "note"),
]


@dataclass(frozen=True)
class Reproduction:
    """What came out of a comparison.

    Attributes:
        rows: One per quantity, and one per task, workload or case that was not measured again.
        results: Number of published results that were measured again.
        missing: Number of those that were not.
        planned: Number of the missing ones that the study asks for again.
        alone: Number of own results of which nothing is published.
    """

    rows: list[Row]
    results: int
    missing: int
    planned: int
    alone: int

    def count(self, verdict: str) -> int:
        """Returns the number of rows with a verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def summary(self) -> str:
        """Returns the outcome in two sentences."""
        total, planned = self.results + self.missing, f"{self.planned:,} of them planned"
        judged = (
            f"{self.count(REPRODUCED):,} quantities are reproduced, {self.count(DIFFERS):,} differ"
            f" and {self.count(UNDECIDED):,} lack evidence, with {self.count(SHOWN):,} more shown "
            "and not judged."
        )
        measured = (
            f"Of {total:,} published results {self.results:,} were measured again and "
            f"{self.missing:,} were not run, {planned}."
        )
        return f"{judged} {measured}"

    def table(self) -> pd.DataFrame:
        """Returns all rows as a table, what is compared first and where it was measured last."""
        table = pd.DataFrame([row.as_dict() for row in self.rows])
        return table[[*COLUMNS, *(name for name in table if name not in COLUMNS)]]


def _not_run(missing: list[Missing]) -> list[Row]:
    """Returns a row per task, workload or case, which counts its seeds and repetitions."""
    counted: Counter[tuple[str, str, str, str]] = Counter()
    planned: Counter[tuple[str, str, str, str]] = Counter()
    for one in missing:
        names: dict[str, Any] = one.names
        what = next((names[n] for n in ("task", "workload", "case") if n in names), "append")
        key = (one.stage, str(names.get("model", "")), str(names.get("scheme", "")), str(what))
        counted[key] += 1
        planned[key] += one.planned
    return [
        Row(
            Subject(*key, results=count), "", NOT_RUN,
            note=f"{planned[key]} planned" if planned[key] else "",
        )
        for key, count in counted.items()
    ]  # fmt: skip


def compare(study: Study, found: Found) -> Reproduction:
    """Compares everything that is on both sides.

    Args:
        study: The study, whose margins count.
        found: Both sides, verified.

    Raises:
        UserError: Samples of a record are not paired with those of the published one.
    """
    rows = evaluation_rows(study, found.pairs) + timed_rows(study, found.pairs)
    return Reproduction(
        rows + _not_run(found.missing), len(found.pairs), len(found.missing),
        sum(one.planned for one in found.missing), len(found.alone),
    )  # fmt: skip
