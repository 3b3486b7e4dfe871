"""Rows of the collected tables `perf`, `energy`, `append` and `kernels`, from verified records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvquant.analysis.problems import Problems
from kvquant.analysis.spec_checks import (
    check_append,
    check_energy,
    check_kernels,
    check_throughput,
)
from kvquant.study.config import Study
from kvquant.study.digests import append_digest, energy_digest, kernels_digest, perf_digest
from kvquant.study.records import (
    AppendRecord,
    EnergyRecord,
    EnergySide,
    KernelRecord,
    Percentiles,
    ThroughputRecord,
)


def _side(prefix: str, side: Any) -> dict[str, Any]:
    row: dict[str, Any] = {f"{prefix}_status": side.status}
    for name in ("prefill_ms", "decode_ms", "quantize_ms"):
        times = getattr(side, name)
        for part in ("median", "p10", "p90", "p99"):
            row[f"{prefix}_{name}_{part}"] = getattr(times, part) if times else None
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes", "bits_per_element"):
        row[f"{prefix}_{name}"] = getattr(side, name)
    row[f"{prefix}_rounds"] = side.prefill_ms.n if side.prefill_ms else 0
    return row


def _trial_ratios(ours: EnergySide, base: EnergySide) -> dict[str, float | None]:
    """Returns the lowest and the highest energy ratio of two trials that followed each other."""
    sides = ([j / n for j, n in zip(s.joules, s.tokens, strict=True) if n] for s in (ours, base))
    ratios = [a / b for a, b in zip(*sides, strict=False) if b > 0]
    return {f"energy_ratio_{end}": f(ratios) if ratios else None
            for end, f in (("low", min), ("high", max))}  # fmt: skip


def timed_rows(
    study: Study, results: Path, device: str, problems: Problems
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns a row per throughput job, and a row per energy job."""
    perf: list[dict[str, Any]] = []
    energy: list[dict[str, Any]] = []
    keys = ["device", "model", "scheme", "workload", "rep"]
    for model in study.models:
        for scheme, workload, rep in study.throughput_cells():
            file = results / "perf" / device / model / scheme / workload / f"rep{rep}.json"
            expected = perf_digest(study, model, scheme, workload)
            names = {"device": device, "model": model, "scheme": scheme, "workload": workload}
            record = problems.read(file, ThroughputRecord, expected, names | {"rep": rep})
            if record is None or not problems.fits(file, check_throughput, study, record):
                continue
            measured = [record.scheme_side.prefill_ms, record.baseline_side.prefill_ms]
            problems.once(file, "perf", [m.model_dump() for m in measured if m is not None])
            row = {name: getattr(record, name) for name in keys}
            row |= {"prompt_tokens": record.prompt_tokens, "batch_size": record.batch_size}
            row |= {"prefill_ratio": record.prefill_ratio, "quantize_share": record.quantize_share}
            ours, base = record.scheme_side.decode_ms, record.baseline_side.decode_ms
            row["decode_ratio"] = base.median / ours.median if ours and base else None
            perf.append(
                row | _side("scheme", record.scheme_side) | _side("base", record.baseline_side)
            )
        for scheme, workload, rep in study.energy_cells():
            file = results / "energy" / device / model / scheme / workload / f"rep{rep}.json"
            expected = energy_digest(study, model, scheme, workload)
            names = {"device": device, "model": model, "scheme": scheme, "workload": workload}
            joules = problems.read(file, EnergyRecord, expected, names | {"rep": rep})
            if joules is None or not problems.fits(file, check_energy, study, joules):
                continue
            both = (joules.scheme_side, joules.baseline_side)
            problems.once(file, "energy", [[s.joules, s.seconds] for s in both])
            row = {name: getattr(joules, name) for name in keys}
            row |= {"source": joules.source, "method": joules.method}
            row |= {"idle_watts": joules.idle_watts, "energy_ratio": joules.energy_ratio}
            row |= _trial_ratios(joules.scheme_side, joules.baseline_side)
            for prefix, side in (("scheme", joules.scheme_side), ("base", joules.baseline_side)):
                row[f"{prefix}_joules_per_token"] = side.joules_per_token
                row[f"{prefix}_joules_per_token_above_idle"] = side.joules_per_token_above_idle
                row[f"{prefix}_trials"] = len(side.joules)
                each = [j / n for j, n in zip(side.joules, side.tokens, strict=True) if n]
                for end, chosen in (("low", min), ("high", max)):
                    row[f"{prefix}_joules_per_token_{end}"] = chosen(each) if each else None
            energy.append(row)
    return perf, energy


def _spread(prefix: str, times: Percentiles | None) -> dict[str, Any]:
    parts = ("median", "p10", "p90", "p99", "n")
    return {f"{prefix}_{part}": getattr(times, part) if times else None for part in parts}


def append_rows(
    study: Study, results: Path, device: str, problems: Problems
) -> list[dict[str, Any]]:
    """Returns a row per point; none for a study that does not measure appends."""
    rows: list[dict[str, Any]] = []
    for rep in range(study.append.reps if study.append else 0):
        file = results / "append" / device / f"rep{rep}.json"
        names = {"device": device, "rep": rep}
        record = problems.read(file, AppendRecord, append_digest(study), names)
        if record is None or not problems.fits(file, check_append, study, record):
            continue
        problems.once(file, "append", [p.call_ms.model_dump() for p in record.points if p.call_ms])
        shape = {name: getattr(record, name) for name in ("batch_size", "kv_heads", "head_dim")}
        for point in record.points:
            row: dict[str, Any] = {"device": record.device, "rep": rep, **shape}
            for name in ("series", "chunk", "tokens", "status", "cache_bytes"):
                row[name] = getattr(point, name)
            for name in ("token_ms", "call_ms"):
                row |= _spread(name, getattr(point, name))
            rows.append(row)
    return rows


def kernel_rows(
    study: Study, results: Path, device: str, problems: Problems
) -> list[dict[str, Any]]:
    """Returns a row per side; none for a study that does not measure kernels."""
    rows: list[dict[str, Any]] = []
    for case in study.kernel_cases():
        file = results / "kernels" / device / f"{case}.json"
        names = {"device": device, "case": case}
        record = problems.read(file, KernelRecord, kernels_digest(study, case), names)
        if record is None or not problems.fits(file, check_kernels, study, record):
            continue
        keys = ("device", "case", "shape", "scheme", "batch", "tokens", "all_tokens")
        same = {name: getattr(record, name) for name in keys}
        for part in record.parts:
            for side in part.sides:
                row: dict[str, Any] = {**same, "measure": part.measure}
                plain = side.model_dump(exclude={"ms", "over_ours", "reason"})
                row |= plain | _spread("ms", side.ms) | _spread("over_ours", side.over_ours)
                rows.append(row | {"copy_gb_per_s": part.copy_gb_per_s})
    return rows
