"""The claims of a study as the landing page shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from kvquant.analysis.claim_list import CLAIMS
from kvquant.analysis.claims import ANY, num_models
from kvquant.analysis.evidence import NOT_MEASURED, VERDICTS
from kvquant.analysis.landing.results import Result, Results
from kvquant.errors import UserError

COLUMNS = ("claim", "model", "definition", "measured", "verdict")  # the others may be absent


@dataclass(frozen=True)
class ClaimRow:
    """A claim with its verdict.

    Attributes:
        text: The claim.
        model: The model that it was judged on; empty where it needs none.
        definition: What it asks for.
        verdict: One of :data:`kvquant.analysis.evidence.VERDICTS`.
        value: The value with its interval, what they are and the bar, as far as the table has them.
        measured: All that was measured, in parts, or why nothing was.
        evidence: On how much; empty for what was not measured.
        results: Figures and tables behind it.
    """

    text: str
    model: str
    definition: str
    verdict: str
    value: tuple[str, ...]
    measured: tuple[str, ...]
    evidence: str
    results: tuple[Result, ...]

    @property
    def is_measured(self) -> bool:
        """Returns whether the study has measured anything for it."""
        return self.verdict != NOT_MEASURED


def _results(claim: str, shown: Results) -> tuple[Result, ...]:
    """Returns what is behind a claim, or of one that is not registered the table of claims."""
    known = CLAIMS.get(claim)
    found = [shown.figures[n] for n in (known.figures if known else ()) if n in shown.figures]
    found += [shown.pages[n] for n in (known.pages if known else ()) if n in shown.pages]
    return tuple(found or [shown.pages[name] for name in ("claims",) if name in shown.pages])


def _number(text: str) -> str:
    """Returns a number of the table with three significant digits."""
    return f"{float(text):#.3g}".rstrip(".")


def _value(row: Mapping[str, str]) -> Iterator[str]:
    """Yields value with interval, what they are, what was compared where, and the bar."""
    get = row.get
    if get("value", ""):
        ends = f" [{_number(row['low'])}, {_number(row['high'])}]" if get("low", "") else ""
        yield _number(row["value"]) + ends
        kind = f"brackets: {get('interval')}" if ends and get("interval") else ""
        yield ", ".join(filter(None, (get("quantity", ""), kind)))
        sides = " against ".join(filter(None, (get("cache", ""), get("baseline", ""))))
        device = f"on {get('device')}" if get("device") else ""
        study = f"study {get('study')}" if get("study") else ""
        yield ", ".join(filter(None, (sides, get("workload", ""), device, study)))
        if get("bar"):
            yield f"bar: {get('bar')}"


def _evidence(row: Mapping[str, str]) -> str:
    """Returns how much was measured, in words or as a number of something."""
    count = row.get("n", "")
    return row.get("evidence") or (f"{int(count):,} {row.get('n_of', '')}".strip() if count else "")


def claim_rows(table: pd.DataFrame, shown: Results) -> Iterator[ClaimRow]:
    """Yields the claims of a table; other columns are left out.

    The model of a claim is named where there are several. A claim that was judged on a companion
    has no results in this report.

    Args:
        table: `claims.csv`, with texts alone.
        shown: The results of the report.

    Raises:
        UserError: The table lacks a column.
    """
    if missing := [name for name in COLUMNS if name not in table]:
        raise UserError(f"claims.csv: no column '{missing[0]}': make it again (`kvquant claims`)")
    names = {claim.text: name for name, claim in CLAIMS.items()}
    several = num_models(table) > 1
    rows: list[Mapping[str, str]] = table.to_dict("records")
    for row in rows:
        model = row["model"] if several and row["model"] != ANY else ""
        found = () if row.get("study") else _results(names.get(row["claim"], ""), shown)
        yield ClaimRow(
            row["claim"],
            model,
            row["definition"],
            row["verdict"],
            tuple(filter(None, _value(row))),
            tuple(row["measured"].split("; ")),
            _evidence(row),
            found,
        )


def verdict_counts(rows: list[ClaimRow]) -> list[tuple[str, int]]:
    """Returns how many claims have each verdict, verdicts of no claim left out."""
    counts = [(verdict, sum(row.verdict == verdict for row in rows)) for verdict in VERDICTS]
    return [(verdict, count) for verdict, count in counts if count]
