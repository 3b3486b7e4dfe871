"""Numbers of whole jobs: what fits, how fast it runs and what it takes, and over 16-bit caches."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from kvquant.analysis.labels import job_label
from kvquant.analysis.numbers.number import Number, fact, measured, spread
from kvquant.analysis.study_tables import Tables

# Column: key, digits, factor.
COLUMNS = {
    "batch_size": ("prompts", 0, 1),
    "capacity_tokens": ("held", 0, 1),
    "context_tokens": ("longest", 0, 1),
    "formula_tokens": ("by-formula", 0, 1),
    "prefill_tokens_per_s": ("prefill", 0, 1),
    "step_ms_median": ("step", 1, 1),
    "step_ms_p99": ("step-p99", 1, 1),
    "first_token_ms_median": ("first-token", 0, 1),
    "decode_tokens_per_s": ("answer", 0, 1),
    "job_tokens_per_s": ("job", 0, 1),
    "joules_per_token": ("joules", 3, 1),
    "joules_per_prompt_token": ("prompt-millijoules", 0, 1000),
    "joules_per_answer_token": ("answer-joules", 2, 1),
    "joules_per_token_above_idle": ("joules-above-idle", 3, 1),
    "counter_over_power": ("counter-over-power", 3, 1),
    "bits_per_element": ("bits", 2, 1),
    "peak_bytes": ("peak", 1, 1e-9),
    "trials": ("trials", 0, 1),
}
# Column with ends of trials: key of the ratio, and whether the best 16-bit cache has most of it.
RATIOS = {
    "job_tokens_per_s": ("job-ratio", True),
    "decode_tokens_per_s": ("answer-ratio", True),
    "joules_per_token": ("joules-ratio", False),
    "joules_per_prompt_token": ("prompt-joules-ratio", False),
}
# Columns without trials.
PLAIN_RATIOS = {
    "capacity_tokens": ("held-ratio", True),
    "context_tokens": ("longest-ratio", True),
    "prefill_tokens_per_s": ("prefill-ratio", True),
    "step_ms_median": ("step-ratio", False),
}


def numbers(t: Tables) -> Iterator[Number]:
    """Yields jobs.CASE.SCHEME.WHAT; ratios are over the best 16-bit cache of the case."""
    if not len(t.jobs):
        return
    for case, rows in t.jobs[t.jobs.status == "ok"].groupby("case", sort=False):
        yield fact(f"jobs.{case}.name", job_label(t.study.job_cases()[str(case)]), rows)
        plain = [s for s in rows.scheme if t.study.schemes[s].exact]
        base = rows[rows.scheme.isin(plain)]
        for index in rows.index:
            row = rows.loc[[index]]
            prefix = f"jobs.{case}.{row.scheme.iloc[0]}"
            for column, (key, digits, factor) in COLUMNS.items():
                if column in row:
                    value = pd.to_numeric(row[column]).iloc[0] * factor
                    yield from measured(f"{prefix}.{key}", value, digits, row)
            if len(base) and row.scheme.iloc[0] not in plain:
                for number in _ratios(row, base):
                    yield number.within(prefix)


def _ratios(ours: pd.DataFrame, base: pd.DataFrame) -> Iterator[Number]:
    """Yields our values over those of the 16-bit cache that is best by each."""
    mine = ours.iloc[0]
    for column, (key, most) in (RATIOS | PLAIN_RATIOS).items():
        known = base[base[column].notna()] if column in base else base[:0]
        if not len(known) or pd.isna(mine[column]):
            continue
        values = pd.to_numeric(known[column])
        best = known.loc[values.idxmax() if most else values.idxmin()]
        value = float(mine[column] / best[column])
        if column in PLAIN_RATIOS:
            yield from measured(key, value, 2, ours, base)
            continue
        # The slowest of our trials over the fastest of theirs, and the other way around.
        low = float(mine[f"{column}_low"] / best[f"{column}_high"])
        high = float(mine[f"{column}_high"] / best[f"{column}_low"])
        yield from spread(key, (value, low, high), 2, ours, base)
        if key == "joules-ratio":
            yield from measured("joules-saved", 100 * (1 - value), 0, ours, base)
