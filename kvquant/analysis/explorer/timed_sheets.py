"""The tables of timed jobs: a row per scheme and workload, and per cache of each whole job."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from kvquant.analysis.explorer.source import Source, has
from kvquant.analysis.explorer.values import (
    NOT_APPLICABLE,
    NOT_MEASURED,
    STATUSES,
    Cell,
    Column,
    Row,
    Sheet,
    missing,
    number,
    spread,
)
from kvquant.analysis.labels import device_label, job_label
from kvquant.study.timing import TimedStage

GB = 1e9
DEVICE = Column("device", "device", "The GPU on which it was measured.", text=True)
STATUS = Column("status", "status", text=True)
NOWHERE = "-"  # the device of what was not measured


def value_of(row: pd.Series, column: str, why: str, scale: float = 1.0) -> Cell:
    """Returns a number of a row, divided by a scale."""
    value = row.get(column)
    return number(value / scale if pd.notna(value) else None, why)


def spread_of(row: pd.Series, column: str, ends: tuple[str, str], why: str) -> Cell:
    """Returns a number with the ends of its spread, whose columns are `column`_END."""
    middle = row.get(column, row.get(f"{column}_median"))
    low, high = (row.get(f"{column}_{end}") for end in ends)
    return spread(middle, low, high, why)


def why_none(status: str) -> str:
    """Returns why a job that ran has no number."""
    return STATUSES.get(status, NOT_APPLICABLE if status == "ok" else status)


# --- workloads: throughput and energy

_STAGES = {"throughput": "perf", "energy": "energy"}
_OF_WORKLOADS = (
    Column("prefill_ratio", "prefill speed, ratio", "Over the unquantized cache.", 3),
    Column("decode_ratio", "decode speed, ratio", "Over the unquantized cache.", 3),
    Column("quantize_share", "quantizing, share of prefill", "", 3),
    Column("scheme_prefill_tokens_per_s", "prefill, tokens/s", "", 0),
    Column("scheme_decode_tokens_per_s", "decode, tokens/s", "", 1),
    Column("peak_gb", "peak memory, GB", "Largest allocation, with the weights.", 2),
    Column("scheme_bits_per_element", "bits per element", "Of all bytes allocated.", 2),
    Column("energy_ratio", "energy per token, ratio", "Over the unquantized cache's.", 3),
    Column("scheme_joules_per_token", "J per token", "Of the GPU boards, idle power included."),
)


def _workload_cells(mine: pd.DataFrame) -> dict[str, Cell]:
    """Returns the cells of the repetitions of a job: medians, with the ends of repetitions."""
    cells: dict[str, Cell] = {}
    status = "oom" if has(mine, "scheme_status") and (mine.scheme_status == "oom").any() else "ok"
    if has(mine, "scheme_peak_bytes"):
        mine = mine.assign(peak_gb=mine["scheme_peak_bytes"].astype(float) / GB)
    for column in _OF_WORKLOADS:
        name, low, high = column.name, None, None
        values = mine[name].astype(float).dropna() if has(mine, name) else pd.Series(dtype=float)
        if has(mine, f"{name}_low"):
            low, high = mine[f"{name}_low"].min(), mine[f"{name}_high"].max()
        elif len(values) > 1:
            low, high = values.min(), values.max()
        cells[name] = spread(values.median(), low, high, why_none(status))
    cells["status"] = STATUSES.get(status, status)
    cells["source"] = ", ".join(dict.fromkeys(mine["source"])) if has(mine, "source") else "timer"
    return cells


def _of_stage(
    source: Source, stage: str, spec: TimedStage, asked: list[tuple[str, str]]
) -> Iterator[Row]:
    """Yields a row per model, scheme and workload, and device where it was measured."""
    table = getattr(source.tables, _STAGES[stage])
    names = source.labels.timed if stage == "throughput" else source.labels.metered
    for model in source.study.models:
        for scheme, workload in asked:
            chosen = table.iloc[:0]
            if len(table):
                chosen = table[
                    (table.model == model) & (table.scheme == scheme) & (table.workload == workload)
                ]
            first: dict[str, Cell] = {**source.who(model, scheme), "stage": stage}
            first["workload"] = names[workload]
            devices = list(dict.fromkeys(chosen["device"])) if len(chosen) else []
            for device in devices:
                mine = chosen[chosen.device == device]
                cells = first | _workload_cells(mine) | {"device": device_label(str(device))}
                cells["reps"] = f"{len(mine)} of {spec.reps}"
                bits = cells["scheme_bits_per_element"]
                cell = (stage, str(device), model, scheme, workload)
                yield Row(cells, scheme, model, bits=bits, cell=cell)
            if not devices:
                none = {column.name: missing(NOT_MEASURED) for column in _OF_WORKLOADS}
                cells = first | none | {"device": NOWHERE, "reps": f"0 of {spec.reps}"}
                cells |= {"status": NOT_MEASURED, "source": missing(NOT_MEASURED)}
                yield Row(cells, scheme, model, cell=(stage, NOWHERE, model, scheme, workload))


def workloads(source: Source) -> Sheet:
    """Returns the table of throughput and energy jobs, measured or not."""
    study = source.study
    stages = (
        ("throughput", study.throughput, study.throughput_cells()),
        ("energy", study.energy, study.energy_cells()),
    )
    rows = [
        row
        for stage, spec, cells in stages
        for row in _of_stage(source, stage, spec, list(dict.fromkeys(c[:2] for c in cells)))
    ]
    first = (
        Column("stage", "measured", text=True),
        Column("workload", "workload", "Prompts, their tokens, new tokens.", text=True),
        DEVICE,
        STATUS,
    )
    last = (
        Column("source", "measured by", "The source of energy; times are a timer's.", text=True),
        Column("reps", "repetitions", "Measured, of those that the study asks for.", text=True),
    )
    return Sheet([*source.who_columns, *first, *_OF_WORKLOADS, *last], rows)


# --- whole jobs

_OF_JOBS = (
    Column("batch_size", "prompts at once", "As many as fit, or as the case gives.", 0),
    Column("job_tokens_per_s", "whole job, tokens/s", "Prompt and answer tokens.", 0),
    Column("prefill_tokens_per_s", "prefill, tokens/s", "", 0),
    Column("decode_tokens_per_s", "answer, tokens/s", "", 1),
    Column("step_ms", "decode step, ms", "Median, 10th and 90th percentile of steps.", 2),
    Column("joules_per_token", "J per token", "Of the GPU boards, by their counters."),
    Column("capacity_tokens", "tokens held", "In all memory of the case.", 0),
    Column("context_tokens", "longest prompt", "A single one.", 0),
    Column("peak_gb", "peak memory, GB", "With the weights.", 2),
    Column("bits_per_element", "bits per element", "Of all bytes allocated.", 2),
    Column("trials", "trials", "", 0),
)
_ENDS = {"job_tokens_per_s": ("low", "high"), "decode_tokens_per_s": ("low", "high")}
_ENDS |= {"joules_per_token": ("low", "high"), "step_ms": ("p10", "p90")}


def _job_rows(source: Source, table: pd.DataFrame) -> Iterator[Row]:
    for name, case in source.study.job_cases().items():
        asked = {"joules_per_token": case.energy, "capacity_tokens": case.capacity}
        asked["context_tokens"] = case.context
        mine = table[table["case"] == name]
        for scheme in case.schemes:
            first: dict[str, Cell] = {**source.who(None, scheme), "case": job_label(case)}
            there = mine[mine.scheme == scheme]
            for _, row in there.iterrows():
                if pd.notna(row.get("peak_bytes")):
                    row = pd.concat([row, pd.Series({"peak_gb": row["peak_bytes"] / GB})])
                cells, status = dict(first), str(row["status"])
                for column in _OF_JOBS:
                    why = why_none(status) if asked.get(column.name, True) else NOT_APPLICABLE
                    ends = _ENDS.get(column.name)
                    if ends == ("low", "high") and not row.get("trials", 0) > 1:
                        ends = None  # one trial has no spread
                    cells[column.name] = (
                        spread_of(row, column.name, ends, why)
                        if ends
                        else value_of(row, column.name, why)
                    )
                cells["device"] = device_label(str(row["device"]))
                cells["status"] = STATUSES.get(status, status)
                cells["decoder"] = str(row.get("decoder") or NOT_APPLICABLE)
                cell = ("jobs", str(row["device"]), name, scheme)
                yield Row(cells, scheme, bits=cells["bits_per_element"], cell=cell)
            if there.empty:
                none = {column.name: missing(NOT_MEASURED) for column in _OF_JOBS}
                cells = first | none | {"device": NOWHERE, "status": NOT_MEASURED}
                cells["decoder"] = missing(NOT_MEASURED)
                yield Row(cells, scheme, cell=("jobs", NOWHERE, name, scheme))


def jobs(source: Source) -> Sheet:
    """Returns the table of whole jobs: a row per cache of each case, measured or not."""
    case = Column("case", "case", "Shape, prompts, prompt + answer tokens, memory.", text=True)
    decoder = Column("decoder", "decoded by", text=True)
    who = [column for column in source.who_columns if column.name != "model"]
    rows = list(_job_rows(source, source.tables.jobs))
    return Sheet([*who, case, DEVICE, STATUS, *_OF_JOBS, decoder], rows)
