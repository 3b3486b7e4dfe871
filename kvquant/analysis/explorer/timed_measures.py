"""The measures of cost: speed, energy and memory of workloads and of whole jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from kvquant.analysis.explorer.measures import Measure, Pair, accuracy, pairs
from kvquant.analysis.explorer.source import Source, has
from kvquant.analysis.explorer.tasks import BASELINE
from kvquant.analysis.explorer.values import (
    NO_MEMORY,
    NOT_ASKED,
    NOT_MEASURED,
    Cell,
    is_missing,
    missing,
    number,
    spread,
)
from kvquant.analysis.figures.pareto_panels import case_of_most
from kvquant.analysis.labels import device_label, job_label
from kvquant.analysis.pareto import counted, first_workload
from kvquant.analysis.timed_on import device_of
from kvquant.study.jobs import JobCase

GB = 1e9
ESTIMATED = "estimated without counters"


class _Kind(NamedTuple):
    """A number of a workload or of a case of whole jobs."""

    column: str
    words: str
    group: str
    more_is_better: bool
    baseline: float | None = None  # of the unquantized cache, by definition
    digits: int | None = None


def _side(table: pd.DataFrame, column: str, baseline: float | None) -> Cell:
    """Returns the cell of the unquantized cache, which is one side of every job."""
    if not len(table):
        return missing(NOT_MEASURED)
    if baseline is not None:
        return {"v": baseline, "t": BASELINE}
    values = table[f"base_{column}"].astype(float) if f"base_{column}" in table else None
    return number(None if values is None else values.median())


def _timed(
    source: Source, table: pd.DataFrame, asked: set[tuple[str, str]], workload: str, kind: _Kind
) -> dict[Pair, Cell]:
    """Returns the cells of a column of timed jobs: the median of repetitions, and their ends.

    Args:
        source: The tables.
        table: Jobs of one device; where it has `column`_low and `column`_high, they are the ends.
        asked: Schemes and workloads that the study measures.
        workload: One of them.
        kind: The number.
    """
    cells: dict[Pair, Cell] = {}
    own = f"scheme_{kind.column}" if kind.baseline is None else kind.column
    rows = table[table.workload == workload] if has(table, own) else table.iloc[:0]
    for model, scheme in pairs(source):
        there = rows[rows.model == model] if len(rows) else rows
        if scheme == source.study.baseline:
            cells[model, scheme] = _side(there, kind.column, kind.baseline)
            continue
        mine = there[there.scheme == scheme] if len(there) else there
        why = NOT_MEASURED if (scheme, workload) in asked else NOT_ASKED
        if has(mine, "scheme_status") and (mine.scheme_status == "oom").any():
            why = NO_MEMORY
        if not len(mine):
            cells[model, scheme] = missing(why)
            continue
        values, low, high = mine[own].astype(float).dropna(), np.nan, np.nan
        if has(mine, f"{own}_low", f"{own}_high"):
            low, high = mine[f"{own}_low"].min(), mine[f"{own}_high"].max()
        elif len(values) > 1:
            low, high = values.min(), values.max()
        cells[model, scheme] = spread(values.median(), low, high, why)
    return cells


def _on(source: Source, table: pd.DataFrame) -> str:
    """Returns the device of timings, in words."""
    device = device_of(source.study, table)
    return f" on {device_label(device)}" if device else ""


def _speeds(source: Source) -> Iterator[Measure]:
    """Yields speeds over the unquantized cache and peak memory of each workload."""
    study, perf = source.study, source.one_device.perf
    if has(perf, "scheme_peak_bytes"):
        sizes = {f"{side}_peak_gb": perf[f"{side}_peak_bytes"] / GB for side in ("scheme", "base")}
        perf = perf.assign(**sizes)
    asked = {(scheme, workload) for scheme, workload, _ in study.throughput_cells()}
    first = first_workload(study.throughput)
    answered = first_workload(study.throughput, answered=True)
    for name, workload in study.throughput.workloads.items():
        label = source.labels.timed[name]
        kinds = [_Kind("prefill_ratio", "prefill speed, ratio", "speed", True, 1, 3)]
        if workload.answer:
            kinds.append(_Kind("decode_ratio", "decode speed, ratio", "speed", True, 1, 3))
        share = "quantizing, share of prefill"
        kinds.append(_Kind("quantize_share", share, "speed", False, 0, 3))
        kinds.append(_Kind("peak_gb", "peak memory, GB", "memory", False, digits=2))
        for kind in kinds:
            text = f"{label}{_on(source, perf)}. "
            text += (
                "Largest allocation, with the weights."
                if kind.group == "memory"
                else "Over the unquantized cache, in turns in one process."
            )
            yield Measure(
                f"{kind.column.replace('_', '-')}-{name}",
                kind.group,
                f"{kind.words}, {label}",
                kind.more_is_better,
                _timed(source, perf, asked, name, kind),
                f"{text} Ends are those of repetitions.",
                in_table=name == (answered if kind.column == "decode_ratio" else first),
                digits=kind.digits,
            )


def _energy(source: Source) -> Iterator[Measure]:
    """Yields energy over the unquantized cache of each workload, where counters measured it."""
    study, energy = source.study, source.one_device.energy
    metered = counted(energy)
    asked = {(scheme, workload) for scheme, workload, _ in study.energy_cells()}
    for name in study.energy.workloads:
        label = source.labels.metered[name]
        kind = _Kind("energy_ratio", "energy per token, ratio", "energy", False, 1, 3)
        cells = _timed(source, metered, asked, name, kind)
        if len(energy) and not len(metered):
            cells = {p: missing(ESTIMATED) if is_missing(c) else c for p, c in cells.items()}
        yield Measure(
            f"energy-{name}",
            kind.group,
            f"{kind.words}, {label}",
            kind.more_is_better,
            cells,
            f"{label}{_on(source, metered)}. Of the GPU boards by their counters, over the "
            "unquantized cache. Ends are those of trials.",
            in_table=name == first_workload(study.energy),
            digits=kind.digits,
        )


_OF_JOBS = (
    _Kind("job_tokens_per_s", "whole job, tokens/s", "speed", True, digits=0),
    _Kind("joules_per_token", "whole job, J per token", "energy", False),
    _Kind("capacity_tokens", "tokens held", "memory", True, digits=0),
    _Kind("peak_gb", "whole job, peak memory, GB", "memory", False, digits=2),
)


def _job_cells(source: Source, rows: pd.DataFrame, case: JobCase, kind: _Kind) -> dict[Pair, Cell]:
    """Returns the cells of a case of whole jobs."""
    cells: dict[Pair, Cell] = {}
    by_scheme = rows.set_index("scheme")
    for pair in pairs(source):
        if pair[1] not in by_scheme.index:
            cells[pair] = missing(NOT_MEASURED if pair[1] in case.schemes else NOT_ASKED)
            continue
        row = by_scheme.loc[pair[1]]
        if kind.group == "energy" and row.get("source") == "estimated":
            cells[pair] = missing(ESTIMATED)
            continue
        why = NO_MEMORY if row["status"] == "oom" else NOT_MEASURED
        several = row.get("trials", 0) > 1  # one trial has no spread
        low, high = (
            row.get(f"{kind.column}_{end}") if several else None for end in ("low", "high")
        )
        cells[pair] = spread(row[kind.column], low, high, why)
    return cells


def _jobs(source: Source) -> Iterator[Measure]:
    """Yields speed, energy and memory of whole jobs, whose models have random weights.

    Speeds depend on shapes alone, so that every model of the study has the same.
    """
    study, jobs = source.study, source.one_device.jobs
    if study.jobs is None or jobs.empty:
        return
    if has(jobs, "peak_bytes"):
        jobs = jobs.assign(peak_gb=jobs["peak_bytes"].astype(float) / GB)
    most = case_of_most(study, jobs)
    held = next((name for name, case in study.job_cases().items() if case.capacity), None)
    for name, case in study.job_cases().items():
        asked = {"joules_per_token": case.energy, "capacity_tokens": case.capacity}
        rows = jobs[jobs.case == name]
        for kind in _OF_JOBS:
            if not has(jobs, kind.column) or not asked.get(kind.column, True):
                continue
            chosen = {"capacity_tokens": name == held, "peak_gb": False}
            yield Measure(
                f"{kind.column.replace('_', '-')}-{name}",
                kind.group,
                f"{kind.words}, {job_label(case)}",
                kind.more_is_better,
                _job_cells(source, rows, case, kind),
                f"{job_label(case)}{_on(source, jobs)}, random weights. Ends are those of trials.",
                in_table=chosen.get(kind.column, name == most),
                digits=kind.digits,
            )


def all_measures(source: Source) -> list[Measure]:
    """Returns all measures of a study."""
    return [*accuracy(source), *_speeds(source), *_energy(source), *_jobs(source)]
