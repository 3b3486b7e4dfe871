"""Writes `numbers.tex`, which has a LaTeX macro for every number of the paper's text."""

from __future__ import annotations

import re

from kvquant.analysis import suite_tables
from kvquant.analysis.booktabs import HEAD, escape, number
from kvquant.analysis.claims_of_cost import append_growth
from kvquant.analysis.pareto import first_workload
from kvquant.analysis.study_tables import Tables
from kvquant.study.suite import scored_suites

DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def macro(*words: str) -> str:
    """Returns a LaTeX macro name: digits are spelt, words are in camel case.

    Example: ("nuq3-1pct", "bits") gives "NuqThreeOnepctBits".
    """
    parts = []
    for word in words:
        for piece in re.split(r"[^A-Za-z0-9]+", word):
            spelt = re.sub(r"\d", lambda m: DIGITS[int(m.group())], piece)
            parts.append(spelt[:1].upper() + spelt[1:])
    return "".join(parts)


def _each_model(t: Tables, values: dict[str, str]) -> str:
    """Returns the value of every model, with its name where there are several."""
    if len(values) == 1:
        return next(iter(values.values()))
    named = [f"{value} ({escape(t.labels.model(model))})" for model, value in values.items()]
    return f"{', '.join(named[:-1])} and {named[-1]}"


def _headline(t: Tables) -> dict[str, str]:
    """Returns the macros of the headline scheme, with a value for every model."""
    columns = {"Bits": ("bits_per_element", 2), "Loss": ("perplexity_change", 2)}
    columns |= {"Prefill": ("prefill_ratio", 3), "Kl": ("kl", 4)}
    mine = t.pareto[t.pareto.scheme == t.study.headline].set_index("model")
    out = {}
    for word, (column, digits) in columns.items():
        values = {m: number(mine[column].get(m), digits) for m in t.study.models}
        missing = {m: "(not measured)" if v == "-" else v for m, v in values.items()}
        out[f"Headline{word}"] = _each_model(t, missing)
    return out


def numbers(t: Tables) -> str:
    """Returns the macros of all numbers that the text may use.

    Names are unique: of two keys that are spelt the same, the second gets "Again".
    """
    prefill = first_workload(t.study.throughput)
    quality = next(iter(t.pareto.quality_task), "")
    out: dict[str, str] = {
        "Study": escape(t.study.study),
        "Title": escape(t.study.title or t.study.study),
        "Models": escape(", ".join(map(t.labels.model, t.study.models))),
        "Device": escape(", ".join(t.devices()) or "no device"),
        "Seeds": str(len(t.study.seeds)),
        "Schemes": str(len(t.study.schemes)),
        "Comparisons": str(int((t.tests["level"] == "task").sum()) if len(t.tests) else 0),
        "SuiteComparisons": str(int((t.tests["level"] == "suite").sum()) if len(t.tests) else 0),
        "Headline": escape(t.labels.scheme(t.study.headline)),
        "LongBench": escape(suite_tables.suite_name(t, "longbench")),
        "QualityTask": escape(t.labels.task(quality) if quality else "no task"),
        "PrefillWorkload": escape(t.labels.timed[prefill] if prefill else "no workload"),
        **_headline(t),
    }

    def put(value: str, *words: str) -> None:
        name = macro(*words)
        while name in out:
            name += "Again"
        out[name] = value

    for word, series in (("Append", t.study.headline), ("Concatenation", "concatenation")):
        grown = append_growth(t.on_one_device().append, series)
        if grown is not None:
            put(number(grown[0]), word, "growth")
    several = len(t.study.models) > 1
    for row in t.pareto.to_dict("records"):
        name = (row["model"], row["scheme"]) if several else (row["scheme"],)
        put(number(row["bits_per_element"]), *name, "bits")
        put(number(row["perplexity"]), *name, "perplexity")
        put(number(row["perplexity_change"]), *name, "loss")
        put(number(row["kl"], 4), *name, "kl")
        for suite in scored_suites():
            put(number(row[suite], 1), *name, suite)
            put(number(row[f"{suite}_change"], 1), *name, suite, "change")
            test = suite_tables.suite_test(t, suite, row["model"], row["scheme"])
            put("-" if test is None else escape(test.verdict), *name, suite, "verdict")
        put(number(row["prefill_ratio"], 3), *name, "prefill")
    lines = [f"\\newcommand{{\\kv{name}}}{{{value}}}" for name, value in out.items()]
    return HEAD + "\n".join(lines) + "\n"
