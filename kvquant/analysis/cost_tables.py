"""The paper's LaTeX tables of comparisons, speed, energy and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from kvquant.analysis import suite_tables
from kvquant.analysis.booktabs import booktabs, number, p_value, signed
from kvquant.analysis.carbon import grams_per_million, has_grams
from kvquant.analysis.pareto import bits_of, first_task
from kvquant.analysis.study_tables import Tables


def _sides(t: Tables, row: Any, reps: int) -> dict[str, Any]:
    """Returns the first columns of a timed row: device, model, repetition if there are several."""
    first = {"device": row.device} if len(t.devices()) > 1 else {}
    first |= {"model": row.model} if len(t.study.models) > 1 else {}
    last = {"rep": row.rep + 1} if reps > 1 else {}
    return first | {"workload": row.workload, "scheme": row.scheme} | last


def _shown(t: Tables, table: pd.DataFrame, *, energy: bool = False) -> Iterator[Any]:
    """Yields the rows of a table with names in place of keys."""
    yield from t.labels.of(table, energy=energy).itertuples()


def _timed(rows: list[dict[str, Any]], figures: int, texts: int = 0) -> str:
    """Returns a table of timed rows: `figures` columns of numbers, then `texts` columns of text."""
    table = pd.DataFrame(rows, dtype=object)
    labels = table.shape[1] - figures - texts if rows else 0
    return booktabs(table, "l" * labels + "r" * figures + "l" * texts)


def statistics(t: Tables) -> str:
    """Builds the table of all comparisons: both tests, family, margin and verdict.

    The interval, the pairs won and lost and the first p are of prompts (rows, windows), which give
    the verdict; the second p is the t-test over seeds, where seeds are independent.
    """
    ordered = t.tests.sort_values("level", kind="stable", key=lambda level: level != "suite")
    several = len(t.study.models) > 1
    rows = [
        ({"model": t.labels.model(r.model)} if several else {})
        | {
            "task": f"{t.labels.task(r.task)}{' (mean)' * (r.level == 'suite')}",
            "scheme": t.labels.scheme(r.scheme),
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
    """Returns the prompt tokens per second of one side, or why there are none."""
    if getattr(row, f"{side}_status", "ok") == "oom":
        return "out of memory"
    return number(getattr(row, f"{side}_prefill_tokens_per_s"), 0)


def throughput(t: Tables) -> str:
    """Builds the table of speeds over the baseline, a row per repetition."""
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
        for r in _shown(t, t.perf)
    ]
    return _timed(rows, 6)


def _grams(row: Any, country: str) -> str:
    """Returns the grams of CO2e per million tokens of both sides of a job."""
    if row.source == "estimated":
        return "-"
    sides = (row.scheme_joules_per_token, row.base_joules_per_token)
    return " / ".join(number(grams_per_million(float(joules), country)) for joules in sides)


def energy(t: Tables) -> str:
    """Builds the table of joules per token, a row per repetition, with the source of each.

    Grams of CO2e per million tokens stand beside joules that counters measured: the scheme's, and
    behind the stroke the baseline's.
    """
    countries = t.study.countries if has_grams(t.study, t.energy) else []
    rows = [
        _sides(t, r, t.study.energy.reps)
        | {
            "J/token": number(r.scheme_joules_per_token, 4),
            "fp16 J/token": number(r.base_joules_per_token, 4),
            "ratio": number(r.energy_ratio, 3) if r.source != "estimated" else "-",
        }
        | {f"g CO2e/M, {country}": _grams(r, country) for country in countries}
        | {"trials": r.scheme_trials, "source": r.source}
        for r in _shown(t, t.energy, energy=True)
    ]
    return _timed(rows, 4 + len(countries), 1)


def memory(t: Tables) -> str:
    """Builds the table of bits per element from allocated bytes, on the first task of each suite.

    A mean over more tasks would compare schemes at other lengths where one of them lacks a task.
    """
    suites = t.evaluations.suite.unique()
    tasks = [first_task(t.study, t.evaluations, str(suite)) for suite in suites]
    rows, several = [], len(t.study.models) > 1
    for (model, scheme), group in t.evaluations.groupby(["model", "scheme"], sort=False):
        row = {"model": t.labels.model(str(model))} if several else {}
        row |= {"scheme": t.labels.scheme(str(scheme))}
        for task in filter(None, tasks):
            row[t.labels.task(task)] = number(bits_of(group[group.task == task]))
        rows.append(row)
    table = pd.DataFrame(rows).fillna("-")  # a scheme that cannot run a task's protocol
    labels = 1 + several
    return booktabs(table, "l" * labels + "r" * (table.shape[1] - labels), size="footnotesize")
