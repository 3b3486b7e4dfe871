"""`kvquant claims`: writes each claim with its definition, measured value and verdict.

A claim reads the tables of one model and returns what was measured, on how much, and whether that
meets the bar, or says why this study cannot speak to it. A verdict asks for a stated minimum of
evidence; below it, and where the interval holds the bar, it is "not enough evidence".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from kvquant.analysis.booktabs import booktabs
from kvquant.analysis.claim_list import CLAIMS, Claim
from kvquant.analysis.companion_tables import attention_companions, measures_attention
from kvquant.analysis.evidence import VERDICTS, Outcome
from kvquant.analysis.labels import device_label, labels_of
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.formats.files import replace as write_file
from kvquant.study.config import Study, load_study
from kvquant.study.dotted import load

ANY = "any"  # the model of a claim that needs none


def judge(tables: Tables, companions: Sequence[Tables] | None = None) -> pd.DataFrame:
    """Returns a row per claim and model; `model` is "any" for a claim that needs no model.

    Claims about 8-bit attention of prompts are judged on the study if it has such a scheme, and on
    each of its companions that has one, whose names are then in the column `study`.

    Args:
        tables: The study's tables.
        companions: Those of its companions, where they are read already; None: they are read.

    Raises:
        UserError: A companion or one of its published records cannot be used.
    """
    tables = tables.on_one_device()
    if companions is None:
        companions = list(attention_companions(tables.study))
    rows: list[dict[str, Any]] = []
    for claim in CLAIMS.values():
        if not claim.of_attention or measures_attention(tables.study):
            rows += _rows(claim, tables)
        for other in companions if claim.of_attention else []:
            # a companion that times nothing is there for what models lose
            if claim.applies_to == "model" or other.study.jobs is not None:
                rows += _rows(claim, other, study=other.study.study)
    # what is of no model was found once for each of them
    table = pd.DataFrame(rows).astype({"n": "Int64"})
    return table.drop_duplicates(ignore_index=True)


def _rows(claim: Claim, tables: Tables, study: str = "") -> Iterator[dict[str, Any]]:
    """Yields the rows of a claim, one per model if it is about models.

    Args:
        claim: The claim.
        tables: The tables that it is judged on.
        study: The name of their study if it is a companion.
    """
    headline = tables.labels.scheme(tables.study.headline)
    of_model = claim.applies_to == "model"
    verdict = load(claim.judge)
    for model in tables.study.models if of_model else [ANY]:
        outcome: Outcome = verdict(tables.of(model) if of_model else tables)
        yield {
            "claim": claim.text,
            "model": model if outcome.of_model else ANY,
            "cache": outcome.cache or claim.cache.replace("{headline}", headline),
            "baseline": outcome.baseline or claim.baseline,
            "workload": outcome.workload,
            "protocol": claim.protocol,
            "device": outcome.device,
            "study": study,
            "quantity": claim.quantity,
            "value": outcome.value,
            "low": outcome.low,
            "high": outcome.high,
            "interval": outcome.interval,
            "n": outcome.n,
            "n_of": outcome.n_of,
            "bar": str(claim.bar),
            "verdict": outcome.verdict,
            "measured": outcome.measured,
            "definition": claim.definition.replace("{headline}", headline),
        }


def named(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Returns the claims with names of models and devices for their keys, as readers see them."""
    names: dict[str, str] = {}
    for each in (study, *map(load_study, study.companions.values())):
        names = {**labels_of(each).models, **names}
    return table.assign(
        model=[names.get(key, key) for key in table["model"]],
        device=[device_label(key) if key else "" for key in table["device"]],
    )


def num_models(table: pd.DataFrame) -> int:
    """Returns the number of models that a table of claims is about."""
    return len(set(table["model"]) - {ANY})


def digits(value: float) -> str:
    """Returns a number of a claim with three significant digits, or a dash for none."""
    return "-" if math.isnan(value) else f"{value:#.3g}".rstrip(".")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the claims with cells as readers see them, beside the columns of the CSV.

    Args:
        table: What :func:`judge` returned, with names (:func:`named`).

    Returns:
        The table with columns `number`, `ends` (with what they are), `amount` (with what is
        counted) and `where` (workload, device and companion) besides.
    """
    added = []
    for r in table.itertuples():
        there = not pd.isna(r.n)
        there_measured = r.device and f"on {r.device}", r.study and f"study {r.study}"
        where = ", ".join(filter(None, (r.workload, *there_measured)))
        ends = f"[{digits(r.low)}, {digits(r.high)}] {r.interval}"
        added.append(
            {
                "number": digits(r.value),
                "ends": "-" if math.isnan(r.low) else ends,
                "amount": f"{r.n:,} {r.n_of}" if there else "-",
                "where": where,
            }
        )
    return table.assign(**pd.DataFrame(added, index=table.index))


def latex(table: pd.DataFrame, *, models: bool) -> str:
    """Returns the table of claims for the paper, a row each, which may break across pages.

    Args:
        table: What :func:`readable` returned.
        models: Whether there are several models to be told apart.
    """
    rows = []
    for r in table.itertuples():
        rows.append(
            {
                "claim": r.claim,
                **({"model": r.model} if models else {}),
                "quantity, cache, baseline": f"{r.quantity}: {r.cache} against {r.baseline}",
                "workload, and protocol": "; ".join(filter(None, (r.where, r.protocol))),
                "value": r.number,
                "interval": r.measured if pd.isna(r.n) else r.ends,
                "n": r.amount,
                "bar": r.bar,
                "verdict": r.verdict,
            }
        )
    widths = [2.0, 3.4, 3.2, 0.9, 2.1, 1.3, 1.2, 1.5]
    if models:  # whose names take the room of the two widest
        widths[:3] = [1.9, 1.5, 2.6, 2.5]
    columns = "".join(f"L{{{width}cm}}" for width in widths)
    cells = pd.DataFrame(rows).map(lambda cell: str(cell).replace(" %", "\N{NO-BREAK SPACE}%"))
    return booktabs(cells, columns, size="scriptsize", tight=True, pages=True, gap=3)


def run(args: argparse.Namespace) -> None:
    """Writes the claims as CSV and LaTeX."""
    study = load_study(args.study)
    table = named(study, judge(load_tables(study, args.tables)))
    write_file(args.out, table.to_csv(index=False))
    write_file(args.tex, latex(readable(table), models=num_models(table) > 1))
    counts = table["verdict"].value_counts()
    print("claims: " + ", ".join(f"{counts.get(v, 0)} {v}" for v in VERDICTS))
