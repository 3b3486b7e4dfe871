"""`kvquant tables`: booktabs tables and `numbers.tex`, a macro for every number of the text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from kvquant.analysis import suite_tables
from kvquant.analysis.booktabs import HEAD, booktabs, escape, number, p_value, signed
from kvquant.analysis.claims import Tables, append_growth, load_tables
from kvquant.analysis.pareto import SCORED
from kvquant.config import load_study
from kvquant.errors import UserError

DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def statistics(t: Tables) -> str:
    """Both tests of every comparison, its family and margin, and the verdict: suites' means first.

    The interval, the pairs won and lost and the first p are of prompts (rows, windows), which give
    the verdict; the second p is the t-test over seeds, where seeds are independent.
    """
    ordered = t.tests.sort_values("level", kind="stable", key=lambda level: level != "suite")
    several = len(t.study.models) > 1
    rows = [
        ({"model": r.model} if several else {})
        | {
            "task": f"{r.task} (mean)" if r.level == "suite" else r.task,
            "scheme": r.scheme,
            "16-bit": suite_tables.kept_tokens(t.study, str(r.scheme)),
            "base": number(r.baseline_mean, 1),
            "difference [95 % CI]": signed(r.difference, r.sample_ci_low, r.sample_ci_high),
            "margin": number(r.margin),
            "won:lost/n": f"{r.won}:{r.lost}/{r.sample_pairs}",
            "p (pairs)": p_value(r.p_sample_holm),
            "p (seeds)": p_value(r.p_holm) if r.paired_by == "seed" else "-",
            "family": r.family_size,
            "verdict": r.verdict,
        }
        for r in ordered.itertuples()
    ]
    columns = "l" * (3 + several) + "rrrrrrrl"
    return booktabs(pd.DataFrame(rows), columns, size="tiny", pages=True, tight=True)


def throughput(t: Tables) -> str:
    """Speeds over the baseline and the share of quantization."""
    rows = [
        {
            "workload": r.workload,
            "scheme": r.scheme,
            "tok/s": number(r.scheme_prefill_tokens_per_s, 0),
            "fp16 tok/s": number(r.base_prefill_tokens_per_s, 0),
            "prefill": number(r.prefill_ratio, 3),
            "decode": number(r.decode_ratio, 3),
            "quantize": "-" if np.isnan(r.quantize_share) else f"{100 * r.quantize_share:.1f} %",
            "rounds": r.scheme_rounds,
        }
        for r in t.perf.itertuples()
    ]
    columns = ["workload", "scheme", "tok/s", "fp16 tok/s", "prefill", "decode", "quantize"]
    return booktabs(pd.DataFrame(rows, columns=[*columns, "rounds"]), "llrrrrrr")


def energy(t: Tables) -> str:
    """Joules per token; says where no counter was read."""
    rows = [
        {
            "workload": r.workload,
            "scheme": r.scheme,
            "J/token": number(r.scheme_joules_per_token, 4),
            "fp16 J/token": number(r.base_joules_per_token, 4),
            "ratio": number(r.energy_ratio, 3),
            "trials": r.scheme_trials,
            "source": r.source,
        }
        for r in t.energy.itertuples()
    ]
    columns = ["workload", "scheme", "J/token", "fp16 J/token", "ratio", "trials", "source"]
    return booktabs(pd.DataFrame(rows, columns=columns), "llrrrrl")


def memory(t: Tables) -> str:
    """Bits per element from allocated bytes, by suite."""
    rows = []
    for (model, scheme), group in t.evaluations.groupby(["model", "scheme"], sort=False):
        row = {"model": model, "scheme": scheme}
        for suite, part in group.groupby("suite", sort=False):
            row[str(suite)] = number(8 * part.cache_bytes.sum() / part.cache_elements.sum())
        rows.append(row)
    table = pd.DataFrame(rows).fillna("-")  # a scheme that cannot run a task's protocol
    return booktabs(table, "ll" + "r" * (table.shape[1] - 2), size="footnotesize")


TABLES: dict[str, Callable[[Tables], str]] = {
    "summary": suite_tables.summary,
    "perplexity": suite_tables.perplexity,
    "passkey": suite_tables.passkey,
    "ruler": suite_tables.ruler,
    "longbench": suite_tables.longbench,
    "statistics": statistics,
    "throughput": throughput,
    "energy": energy,
    "memory": memory,
}
ACCURACY = ("perplexity", "passkey", "ruler", "longbench", "statistics")  # of evaluations alone


def macro(*words: str) -> str:
    """A LaTeX macro name: digits spelt, words in camel case.

    Example: ("nuq3-1pct", "bits") gives "NuqThreeOnepctBits".
    """
    parts = []
    for word in words:
        for piece in re.split(r"[^A-Za-z0-9]+", word):
            spelt = re.sub(r"\d", lambda m: DIGITS[int(m.group())], piece)
            parts.append(spelt[:1].upper() + spelt[1:])
    return "".join(parts)


def numbers(t: Tables) -> str:
    """Macros of the numbers that the text may use."""
    out = {
        "Study": escape(t.study.study),
        "Seeds": str(len(t.study.seeds)),
        "Schemes": str(len(t.study.schemes)),
        "Comparisons": str(int((t.tests["level"] == "task").sum())),
        "SuiteComparisons": str(int((t.tests["level"] == "suite").sum())),
        "Headline": escape(t.study.headline),
        "LongBench": escape(suite_tables.longbench_name(t)),
    }
    for word, series in (("Append", t.study.headline), ("Concatenation", "concatenation")):
        grown = append_growth(t.append, series)
        if grown is not None:
            out[f"{word}Growth"] = number(grown[0])
    several = len(t.study.models) > 1
    for row in t.pareto.to_dict("records"):
        name = (row["model"], row["scheme"]) if several else (row["scheme"],)
        out[macro(*name, "bits")] = number(row["bits_per_element"])
        out[macro(*name, "perplexity")] = number(row["perplexity"])
        out[macro(*name, "loss")] = number(row["perplexity_change"])
        out[macro(*name, "kl")] = number(row["kl"], 4)
        for suite in SCORED:
            out[macro(*name, suite)] = number(row[suite], 1)
            out[macro(*name, suite, "change")] = number(row[f"{suite}_change"], 1)
            test = suite_tables.suite_test(t, suite, row["model"], row["scheme"])
            out[macro(*name, suite, "verdict")] = "-" if test is None else str(test.verdict)
        out[macro(*name, "prefill")] = number(row["prefill_ratio"], 3)
        if row["scheme"] == t.study.headline and not several:
            out["HeadlineBits"] = out[macro(*name, "bits")]
            out["HeadlineLoss"] = out[macro(*name, "loss")]
            out["HeadlinePrefill"] = out[macro(*name, "prefill")]
            out["HeadlineKl"] = out[macro(*name, "kl")]
    lines = [f"\\newcommand{{\\kv{name}}}{{{value}}}" for name, value in out.items()]
    return HEAD + "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant tables`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out-dir", required=True, type=Path, help="gets one .tex a table")
    parser.add_argument("--numbers", type=Path, help="numbers.tex (not with --present)")
    parser.add_argument(
        "--present",
        action="store_true",
        help="of an unfinished study, the accuracy tables of what is measured so far",
    )


def run(args: argparse.Namespace) -> None:
    """Writes every table and the numbers."""
    if args.present == (args.numbers is not None):
        raise UserError("--numbers: is needed, and left out with --present")
    tables = load_tables(load_study(args.study), args.tables, accuracy_only=args.present)
    chosen = ACCURACY if args.present else tuple(TABLES)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        (args.out_dir / f"{name}.tex").write_text(TABLES[name](tables), encoding="utf-8")
    if args.numbers is not None:
        args.numbers.write_text(numbers(tables), encoding="utf-8")
        chosen += ("numbers",)
    print(f"tables: {', '.join(chosen)}")
