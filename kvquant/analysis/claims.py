"""`kvquant claims`: writes each claim with its definition, measured value and verdict.

A claim reads the tables of one model and returns what was measured, on how much, and whether that
meets the bar, or says why this study cannot speak to it. A verdict asks for a stated minimum of
evidence; below it, and where the interval holds the bar, it is "not enough evidence".
"""

from __future__ import annotations

import argparse

import pandas as pd

from kvquant.analysis.booktabs import booktabs
from kvquant.analysis.claim_list import CLAIMS
from kvquant.analysis.evidence import VERDICTS
from kvquant.analysis.labels import labels_of
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.formats.files import replace as write_file
from kvquant.study.config import Study, load_study
from kvquant.study.dotted import load

ANY = "any"  # the model of a claim that needs none


def judge(tables: Tables) -> pd.DataFrame:
    """Returns a row per claim and model; `model` is "any" for a claim that needs no model."""
    tables = tables.on_one_device()
    headline = labels_of(tables.study).scheme(tables.study.headline)
    rows = []
    for claim in CLAIMS.values():
        of_model = claim.applies_to == "model"
        verdict = load(claim.judge)
        for model in tables.study.models if of_model else [ANY]:
            outcome = verdict(tables.of(model) if of_model else tables)
            rows.append(
                {
                    "claim": claim.text,
                    "model": model if outcome.of_model else ANY,
                    "definition": claim.definition.replace("{headline}", headline),
                    "measured": outcome.value,
                    "evidence": outcome.evidence,
                    "verdict": outcome.verdict,
                }
            )
    # what is of no model was found once for each of them
    return pd.DataFrame(rows).drop_duplicates(ignore_index=True)


def named(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Returns the claims with names of models in place of their keys, as readers see them."""
    names = labels_of(study)
    return table.assign(model=[names.model(key) for key in table["model"]])


def run(args: argparse.Namespace) -> None:
    """Writes the claims as CSV and LaTeX."""
    study = load_study(args.study)
    table = named(study, judge(load_tables(study, args.tables)))
    write_file(args.out, table.to_csv(index=False))
    several = len(study.models) > 1
    shown = table[["model", *table.columns.drop("model")]]
    shown = shown if several else shown.drop(columns="model")
    columns = "L{1.9cm}" * several + "L{2.4cm}L{4.3cm}L{3.3cm}L{2cm}L{1.7cm}"
    write_file(args.tex, booktabs(shown, columns, size="scriptsize", tight=True, pages=True))
    counts = table["verdict"].value_counts()
    print("claims: " + ", ".join(f"{counts.get(v, 0)} {v}" for v in VERDICTS))
