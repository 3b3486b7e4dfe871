"""`kvquant tables`: booktabs tables and `numbers.tex`, a macro for every number of the text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvquant.analysis import suite_tables
from kvquant.analysis.booktabs import HEAD, booktabs, escape, number, p_value, signed
from kvquant.analysis.claims_of_cost import append_growth
from kvquant.analysis.pareto import SCORED, first_workload
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.errors import UserError
from kvquant.study.config import load_study

DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def _sides(t: Tables, row: Any, reps: int) -> dict[str, Any]:
    """The first columns of a timed row: the model and the repetition only where there are more."""
    first = {"model": row.model} if len(t.study.models) > 1 else {}
    last = {"rep": row.rep + 1} if reps > 1 else {}
    return first | {"workload": row.workload, "scheme": row.scheme} | last


def _timed(rows: list[dict[str, Any]], figures: int, texts: int = 0) -> str:
    """A table of timed rows: `figures` columns of numbers, then `texts` columns of text."""
    table = pd.DataFrame(rows, dtype=object)
    labels = table.shape[1] - figures - texts if rows else 0
    return booktabs(table, "l" * labels + "r" * figures + "l" * texts)


def statistics(t: Tables) -> str:
    """Both tests of every comparison, its family and margin, and the verdict: suites' means first.

    The interval, the pairs won and lost and the first p are of prompts (rows, windows), which give
    the verdict; the second p is the t-test over seeds, where seeds are independent.
    """
    if not len(t.tests):
        return booktabs(pd.DataFrame(), "", empty="This study compares no scheme.")
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
    return booktabs(pd.DataFrame(rows, dtype=object), columns, size="tiny", pages=True, tight=True)


def _speed(row: Any, side: str) -> str:
    """Prompt tokens a second of one side, or why there are none."""
    if getattr(row, f"{side}_status", "ok") == "oom":
        return "out of memory"
    return number(getattr(row, f"{side}_prefill_tokens_per_s"), 0)


def throughput(t: Tables) -> str:
    """Speeds over the baseline and the share of quantization, a row a repetition."""
    rows = [
        _sides(t, r, t.study.throughput.reps)
        | {
            "tok/s": _speed(r, "scheme"),
            "fp16 tok/s": _speed(r, "base"),
            "prefill": number(r.prefill_ratio, 3),
            "decode": number(r.decode_ratio, 3),
            "quantize": "-" if np.isnan(r.quantize_share) else f"{100 * r.quantize_share:.1f} %",
            "rounds": r.scheme_rounds,
        }
        for r in t.perf.itertuples()
    ]
    return _timed(rows, 6)


def energy(t: Tables) -> str:
    """Joules per token, a row a repetition; says where no counter was read."""
    rows = [
        _sides(t, r, t.study.energy.reps)
        | {
            "J/token": number(r.scheme_joules_per_token, 4),
            "fp16 J/token": number(r.base_joules_per_token, 4),
            "ratio": number(r.energy_ratio, 3) if r.source != "estimated" else "-",
            "trials": r.scheme_trials,
            "source": r.source,
        }
        for r in t.energy.itertuples()
    ]
    return _timed(rows, 4, 1)


def memory(t: Tables) -> str:
    """Bits per element from allocated bytes, by suite."""
    rows, several = [], len(t.study.models) > 1
    for (model, scheme), group in t.evaluations.groupby(["model", "scheme"], sort=False):
        row = {"model": model} if several else {}
        row |= {"scheme": scheme}
        for suite, part in group.groupby("suite", sort=False):
            row[str(suite)] = number(8 * part.cache_bytes.sum() / part.cache_elements.sum())
        rows.append(row)
    table = pd.DataFrame(rows).fillna("-")  # a scheme that cannot run a task's protocol
    labels = 1 + several
    return booktabs(table, "l" * labels + "r" * (table.shape[1] - labels), size="footnotesize")


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


def _each_model(values: dict[str, str]) -> str:
    """The value of every model, named where there are several."""
    if len(values) == 1:
        return next(iter(values.values()))
    named = [f"{value} ({escape(model)})" for model, value in values.items()]
    return f"{', '.join(named[:-1])} and {named[-1]}"


def _headline(t: Tables) -> dict[str, str]:
    """What the text says of the headline scheme, of every model."""
    columns = {"Bits": ("bits_per_element", 2), "Loss": ("perplexity_change", 2)}
    columns |= {"Prefill": ("prefill_ratio", 3), "Kl": ("kl", 4)}
    mine = t.pareto[t.pareto.scheme == t.study.headline].set_index("model")
    out = {}
    for word, (column, digits) in columns.items():
        values = {m: number(mine[column].get(m), digits) for m in t.study.models}
        missing = {m: "(not measured)" if v == "-" else v for m, v in values.items()}
        out[f"Headline{word}"] = _each_model(missing)
    return out


def numbers(t: Tables) -> str:
    """Macros of the numbers that the text may use.

    Names are unique: of two keys that are spelt the same, the second gets "Again".
    """
    out: dict[str, str] = {
        "Study": escape(t.study.study),
        "Title": escape(t.study.title or t.study.study),
        "Models": escape(", ".join(t.study.models)),
        "Device": escape(", ".join(t.devices()) or "no device"),
        "Seeds": str(len(t.study.seeds)),
        "Schemes": str(len(t.study.schemes)),
        "Comparisons": str(int((t.tests["level"] == "task").sum()) if len(t.tests) else 0),
        "SuiteComparisons": str(int((t.tests["level"] == "suite").sum()) if len(t.tests) else 0),
        "Headline": escape(t.study.headline),
        "LongBench": escape(suite_tables.longbench_name(t)),
        "PrefillWorkload": escape(first_workload(t.study.throughput) or "no workload"),
        **_headline(t),
    }

    def put(value: str, *words: str) -> None:
        name = macro(*words)
        while name in out:
            name += "Again"
        out[name] = value

    for word, series in (("Append", t.study.headline), ("Concatenation", "concatenation")):
        grown = append_growth(t.append, series)
        if grown is not None:
            put(number(grown[0]), word, "growth")
    several = len(t.study.models) > 1
    for row in t.pareto.to_dict("records"):
        name = (row["model"], row["scheme"]) if several else (row["scheme"],)
        put(number(row["bits_per_element"]), *name, "bits")
        put(number(row["perplexity"]), *name, "perplexity")
        put(number(row["perplexity_change"]), *name, "loss")
        put(number(row["kl"], 4), *name, "kl")
        for suite in SCORED:
            put(number(row[suite], 1), *name, suite)
            put(number(row[f"{suite}_change"], 1), *name, suite, "change")
            test = suite_tables.suite_test(t, suite, row["model"], row["scheme"])
            put("-" if test is None else escape(test.verdict), *name, suite, "verdict")
        put(number(row["prefill_ratio"], 3), *name, "prefill")
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
