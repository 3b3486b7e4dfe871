"""Rows of the collected tables `perf`, `energy`, `append` and `kernels`, from verified records."""

from __future__ import annotations

from typing import Any

from kvquant.analysis.problems import Problems
from kvquant.analysis.provenance import short
from kvquant.analysis.sources import Sources
from kvquant.analysis.spec_checks import (
    check_append,
    check_energy,
    check_kernels,
    check_throughput,
)
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


KEYS = ("device", "model", "scheme", "workload", "rep")


def throughput_rows(sources: Sources, problems: Problems) -> list[dict[str, Any]]:
    """Returns a row per throughput job."""
    rows: list[dict[str, Any]] = []
    for source, record in problems.verified(
        sources, "throughput", ThroughputRecord, check_throughput
    ):
        measured = [record.scheme_side.prefill_ms, record.baseline_side.prefill_ms]
        problems.once(source, "perf", [m.model_dump() for m in measured if m is not None])
        row = {name: getattr(record, name) for name in KEYS} | {"record": short(record.seal)}
        row |= {"prompt_tokens": record.prompt_tokens, "batch_size": record.batch_size}
        row |= {"prefill_ratio": record.prefill_ratio, "quantize_share": record.quantize_share}
        ours, base = record.scheme_side.decode_ms, record.baseline_side.decode_ms
        row["decode_ratio"] = base.median / ours.median if ours and base else None
        rows.append(row | _side("scheme", record.scheme_side) | _side("base", record.baseline_side))
    return rows


def energy_rows(sources: Sources, problems: Problems) -> list[dict[str, Any]]:
    """Returns a row per energy job."""
    rows: list[dict[str, Any]] = []
    for source, record in problems.verified(sources, "energy", EnergyRecord, check_energy):
        both = (record.scheme_side, record.baseline_side)
        problems.once(source, "energy", [[s.joules, s.seconds] for s in both])
        row = {name: getattr(record, name) for name in KEYS} | {"record": short(record.seal)}
        row |= {"source": record.source, "method": record.method}
        row |= {"idle_watts": record.idle_watts, "energy_ratio": record.energy_ratio}
        row |= _trial_ratios(record.scheme_side, record.baseline_side)
        for prefix, side in (("scheme", record.scheme_side), ("base", record.baseline_side)):
            row[f"{prefix}_joules_per_token"] = side.joules_per_token
            row[f"{prefix}_joules_per_token_above_idle"] = side.joules_per_token_above_idle
            row[f"{prefix}_trials"] = len(side.joules)
            each = [j / n for j, n in zip(side.joules, side.tokens, strict=True) if n]
            for end, chosen in (("low", min), ("high", max)):
                row[f"{prefix}_joules_per_token_{end}"] = chosen(each) if each else None
        rows.append(row)
    return rows


def _spread(prefix: str, times: Percentiles | None) -> dict[str, Any]:
    parts = ("median", "p10", "p90", "p99", "n")
    return {f"{prefix}_{part}": getattr(times, part) if times else None for part in parts}


def append_rows(sources: Sources, problems: Problems) -> list[dict[str, Any]]:
    """Returns a row per point; none for a study that does not measure appends."""
    rows: list[dict[str, Any]] = []
    for source, record in problems.verified(sources, "append", AppendRecord, check_append):
        points = [p.call_ms.model_dump() for p in record.points if p.call_ms]
        problems.once(source, "append", points)
        shape = {name: getattr(record, name) for name in ("batch_size", "kv_heads", "head_dim")}
        for point in record.points:
            row: dict[str, Any] = {"device": record.device, "rep": record.rep, **shape}
            row["record"] = short(record.seal)
            for name in ("series", "chunk", "tokens", "status", "cache_bytes"):
                row[name] = getattr(point, name)
            for name in ("token_ms", "call_ms"):
                row |= _spread(name, getattr(point, name))
            rows.append(row)
    return rows


def kernel_rows(sources: Sources, problems: Problems) -> list[dict[str, Any]]:
    """Returns a row per side; none for a study that does not measure kernels."""
    rows: list[dict[str, Any]] = []
    for _, record in problems.verified(sources, "kernels", KernelRecord, check_kernels):
        keys = ("device", "case", "shape", "scheme", "batch", "tokens", "all_tokens")
        same = {name: getattr(record, name) for name in keys} | {"record": short(record.seal)}
        for part in record.parts:
            for side in part.sides:
                row: dict[str, Any] = {**same, "measure": part.measure}
                plain = side.model_dump(exclude={"ms", "over_ours", "reason"})
                row |= plain | _spread("ms", side.ms) | _spread("over_ours", side.over_ours)
                rows.append(row | {"copy_gb_per_s": part.copy_gb_per_s})
    return rows
