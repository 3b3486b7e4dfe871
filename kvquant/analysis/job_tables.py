"""The paper's LaTeX tables of whole jobs: speed and memory, and energy."""

from __future__ import annotations

from typing import Any

import pandas as pd

from kvquant.analysis.booktabs import booktabs, number
from kvquant.analysis.carbon import grams_per_million, has_grams
from kvquant.analysis.labels import job_label
from kvquant.analysis.study_tables import Tables
from kvquant.study.jobs import SEARCHED


def _first(t: Tables, row: Any) -> dict[str, Any]:
    """Returns the first columns: the device where there are several, the case and the cache."""
    several = t.jobs["device"].nunique() > 1
    first = {"device": row.device} if several else {}
    case = job_label(t.study.job_cases()[row.case])
    return first | {"case": case, "cache": t.labels.scheme(row.scheme)}


def _count(value: Any) -> str:
    return "-" if pd.isna(value) else f"{int(value):,}"


def jobs(t: Tables) -> str:
    """Builds the table of speeds and memory of whole jobs, a row per cache of a case.

    Where a case has several GPUs, rows say how many they have and how answers were decoded, which a
    CUDA graph does on one GPU alone.
    """
    rows, several = [], bool((t.jobs["gpus"] > 1).any())
    for r in t.jobs.itertuples():
        row = _first(t, r)
        if several:
            row |= {"decoded by": r.decoder or "-", "GPUs": r.gpus}
        row["prompts"] = "out of memory" if r.status == "oom" else _count(r.batch_size)
        row |= {
            "prefill tok/s": number(r.prefill_tokens_per_s, 0),
            "step ms": number(r.step_ms_median),
            "answer tok/s": number(r.decode_tokens_per_s, 0),
            "job tok/s": number(r.job_tokens_per_s, 0),
            "peak GB": number(None if pd.isna(r.peak_bytes) else r.peak_bytes / 1e9, 1),
            "bits": number(r.bits_per_element),
            "trials": r.trials,
        }
        rows.append(row)
    table = pd.DataFrame(rows, dtype=object)
    labels = 2 + ("device" in table) + several
    columns = "l" * labels + "r" * (table.shape[1] - labels)
    return booktabs(table, columns, size="scriptsize", tight=True, pages=True)


def capacity(t: Tables) -> str:
    """Builds the table of what fitted in memory, a row per cache of a case that searched it."""
    rows = [
        _first(t, r)
        | {
            "tokens held": _count(r.capacity_tokens),
            "longest prompt": _count(r.context_tokens),
            "by formula": _count(r.formula_tokens),
            "memory GB": number(r.memory_bytes / 1e9, 1),
            "weights GB": number(r.weight_bytes / 1e9, 1),
            "bits": number(r.bits_per_element),
        }
        for r in t.jobs[t.jobs[list(SEARCHED)].notna().any(axis=1)].itertuples()
    ]
    table = pd.DataFrame(rows, dtype=object)
    labels = 2 + ("device" in table)
    return booktabs(table, "l" * labels + "r" * (table.shape[1] - labels), size="footnotesize")


def _grams(row: Any, country: str) -> str:
    """Returns the grams of CO2e per million prompt and answer tokens of a job."""
    if row.source == "estimated":
        return "-"
    return number(grams_per_million(float(row.joules_per_token), country))


def energy(t: Tables) -> str:
    """Builds the table of the energy of whole jobs, a row per cache of a case.

    Grams of CO2e per million tokens stand beside joules that counters measured.
    """
    countries = t.study.countries if has_grams(t.study, t.jobs) else []
    rows = []
    for r in t.jobs[t.jobs.source.notna()].itertuples():
        if r.status != "ok":
            continue
        rows.append(
            _first(t, r)
            | {
                "J/1000 prompt tokens": number(1e3 * r.joules_per_prompt_token, 1),
                "J/answer token": number(r.joules_per_answer_token, 3),
                "J/token": number(r.joules_per_token, 4),
                "lowest to highest": f"{r.joules_per_token_low:.4f} to "
                f"{r.joules_per_token_high:.4f}",
                "above idle": number(r.joules_per_token_above_idle, 4),
                **{f"g CO2e/M, {country}": _grams(r, country) for country in countries},
                "counter/power": number(r.counter_over_power, 3),
                "trials": r.trials,
                "source": r.source,
            }
        )
    table = pd.DataFrame(rows, dtype=object)
    labels = 2 + ("device" in table)
    columns = "l" * labels + "r" * (table.shape[1] - labels - 1) + "l"
    return booktabs(table, columns, size="scriptsize", tight=True)
