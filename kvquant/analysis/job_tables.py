"""The paper's LaTeX tables of whole jobs: speed and memory, and energy."""

from __future__ import annotations

from typing import Any

import pandas as pd

from kvquant.analysis.booktabs import booktabs, number
from kvquant.analysis.study_tables import Tables


def _first(t: Tables, row: Any) -> dict[str, Any]:
    """Returns the first columns: the device where there are several, the case and the cache."""
    several = t.jobs["device"].nunique() > 1
    first = {"device": row.device} if several else {}
    return first | {"case": row.case, "cache": row.scheme}


def _count(value: Any) -> str:
    return "-" if pd.isna(value) else f"{int(value):,}"


def jobs(t: Tables) -> str:
    """Builds the table of speeds and memory of whole jobs, a row per cache of a case."""
    rows = []
    for r in t.jobs.itertuples():
        row = _first(t, r)
        row["prompts"] = "out of memory" if r.status == "oom" else _count(r.batch_size)
        held = r.capacity_tokens
        row |= {
            "tokens held": _count(held),
            "formula": "-" if pd.isna(held) else _count(r.formula_tokens),
            "prefill tok/s": number(r.prefill_tokens_per_s, 0),
            "first ms": number(r.first_token_ms_median, 0),
            "step ms": number(r.step_ms_median),
            "answer tok/s": number(r.decode_tokens_per_s, 0),
            "job tok/s": number(r.job_tokens_per_s, 0),
            "peak GB": number(None if pd.isna(r.peak_bytes) else r.peak_bytes / 1e9, 1),
            "bits": number(r.bits_per_element),
            "trials": r.trials,
        }
        rows.append(row)
    table = pd.DataFrame(rows, dtype=object)
    labels = 2 + ("device" in table)
    columns = "l" * labels + "r" * (table.shape[1] - labels)
    return booktabs(table, columns, size="scriptsize", tight=True, pages=True)


def energy(t: Tables) -> str:
    """Builds the table of the energy of whole jobs, a row per cache of a case."""
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
                "counter/power": number(r.counter_over_power, 3),
                "trials": r.trials,
                "source": r.source,
            }
        )
    table = pd.DataFrame(rows, dtype=object)
    labels = 2 + ("device" in table)
    columns = "l" * labels + "r" * (table.shape[1] - labels - 1) + "l"
    return booktabs(table, columns, size="scriptsize", tight=True)
