"""`kvquant claims`: each claim with its definition, the measured value and the verdict.

A claim reads the tables of one model and returns what was measured, on how much, and whether that
meets the bar, or says why this study cannot speak to it. A verdict asks for a stated minimum of
evidence; below it, and where the interval holds the bar, it is "not enough evidence". No number is
typed: bars come from the definitions, values from the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kvquant.analysis import claims_of_accuracy, claims_of_cost
from kvquant.analysis.booktabs import booktabs
from kvquant.analysis.evidence import (
    MIN_PROMPTS,
    MIN_ROUNDS,
    MIN_SEEDS,
    MIN_TRIALS,
    VERDICTS,
    Outcome,
    not_measured,
)
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.formats.files import replace as write_file
from kvquant.study.config import load_study

ANY = "any"  # in place of a model, of what is measured without one


@dataclass(frozen=True)
class Claim:
    """A claim of the paper; one that needs a model is judged for each."""

    name: str
    definition: str
    judge: Callable[[Tables], Outcome]
    needs_model: bool = True


CLAIMS = (
    Claim(
        "Loss grows as bits fall",
        "perplexity, protocol of the task: fp16 < 4 < 3 < 2 bits, 1 % outliers, paired by seed: "
        f"the 95 % interval of every step above 0, at least {MIN_SEEDS} seeds",
        claims_of_accuracy.ordering,
    ),
    Claim(
        "Under 0.1 perplexity at 3 bits",
        "headline scheme against fp16 on Llama-2-7B, upper end of the 95 % interval below 0.1 on "
        f"every perplexity task, at least {MIN_SEEDS} seeds",
        claims_of_accuracy.loss_on_7b,
    ),
    Claim(
        "Passkey retrieval kept",
        "headline scheme against fp16, protocol A, paired test of every passkey task: not worse "
        f"beyond the margin, at least {MIN_PROMPTS} prompts and {MIN_SEEDS} seeds per task",
        claims_of_accuracy.passkey,
    ),
    Claim(
        "At most 3.6 bits per element",
        "headline scheme, allocated bytes over elements at 16K tokens or more",
        claims_of_accuracy.bits_per_element,
    ),
    Claim(
        "Prefill at fp16 speed",
        "headline scheme over fp16, prefill tokens/s, interleaved, GPU: at least 0.98 in every "
        f"repetition of the worst workload, at least {MIN_ROUNDS} rounds",
        claims_of_cost.prefill,
    ),
    Claim(
        "Quantization is cheap",
        "headline scheme: quantize and pack over the fp16 prefill: at most 15 % in every "
        f"repetition of the worst workload, at least {MIN_ROUNDS} rounds",
        claims_of_cost.quantize_share,
    ),
    Claim(
        "Energy per token falls by 45 %",
        "headline scheme over fp16, whole job, measured by counters: at most 0.55 in every "
        f"repetition of the worst workload, at least {MIN_TRIALS} trials",
        claims_of_cost.energy,
    ),
    Claim(
        "Append cost does not grow",
        "headline scheme, one layer, one token a call: cost of a token, packing of its block "
        f"included, at 128K tokens over 1K, medians of at least {MIN_ROUNDS} rounds: at most 1.2",
        claims_of_cost.append,
        needs_model=False,
    ),
    Claim(
        "Three times the prefill of KVQuant's procedure",
        "prefill tokens/s over a one-sequence, growing-array reference, GPU: at least 3 in every "
        f"repetition of the worst workload, at least {MIN_ROUNDS} rounds",
        claims_of_cost.over_reference,
    ),
    Claim(
        "Four times the tokens in 40 GB",
        "tokens that fit in a 40 GB budget over fp16: at least 4",
        lambda t: not_measured("capacity is not measured in this study"),
        needs_model=False,
    ),
)


def judge(tables: Tables) -> pd.DataFrame:
    """The claims table: a row a claim and model; `model` is "any" where none is needed."""
    rows = []
    for claim in CLAIMS:
        for model in tables.study.models if claim.needs_model else [ANY]:
            outcome = claim.judge(tables.of(model) if claim.needs_model else tables)
            rows.append(
                {
                    "claim": claim.name,
                    "model": model,
                    "definition": claim.definition,
                    "measured": outcome.value,
                    "evidence": outcome.evidence,
                    "verdict": outcome.verdict,
                }
            )
    return pd.DataFrame(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant claims`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out", required=True, type=Path, help="claims.csv")
    parser.add_argument("--tex", required=True, type=Path, help="claims.tex")


def run(args: argparse.Namespace) -> None:
    """Writes the claims as CSV and LaTeX."""
    study = load_study(args.study)
    table = judge(load_tables(study, args.tables))
    write_file(args.out, table.to_csv(index=False))
    several = len(study.models) > 1
    shown = (
        table[["model", *table.columns.drop("model")]] if several else table.drop(columns="model")
    )
    columns = "L{1.9cm}" * several + "L{2.4cm}L{4.3cm}L{3.3cm}L{2cm}L{1.7cm}"
    write_file(args.tex, booktabs(shown, columns, size="scriptsize", tight=True, pages=True))
    counts = table["verdict"].value_counts()
    print("claims: " + ", ".join(f"{counts.get(v, 0)} {v}" for v in VERDICTS))
