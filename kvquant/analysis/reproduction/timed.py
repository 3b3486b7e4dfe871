"""The quantities of what is timed: ratios of two sides of one process, and what is only shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from kvquant.analysis.reproduction.pairs import Pair
from kvquant.analysis.reproduction.rows import Row, Subject, exact, ratio, shown
from kvquant.analysis.reproduction.tolerances import TOLERANCES
from kvquant.study.config import Study
from kvquant.study.records import (
    AppendRecord,
    EnergyRecord,
    JobRecord,
    JobSide,
    KernelRecord,
    ThroughputRecord,
)


@dataclass(frozen=True)
class Value:
    """One number of a record.

    Attributes:
        part: The side, size or measurement that it is of; empty for the record's own.
        quantity: Its name among the tolerances.
        value: The number, or a status.
        ends: Lowest and highest of rounds or trials.
        note: What a reader must know; a value with one is shown and not judged.
    """

    part: str
    quantity: str
    value: Any
    ends: tuple[float, float] | None = None
    note: str = ""


Values = Iterator[Value]


def _throughput(study: Study, record: ThroughputRecord) -> Values:
    ours, base = record.scheme_side, record.baseline_side
    yield Value("", "prefill speed over baseline", record.prefill_ratio)
    if ours.decode_ms and base.decode_ms:
        speed = base.decode_ms.median / ours.decode_ms.median
        yield Value("", "decode speed over baseline", speed)
    for side in (ours, base):
        yield Value(side.scheme, "status", side.status)
        yield Value(side.scheme, "cache elements", side.cache_elements)
        yield Value(side.scheme, "cache bytes", side.cache_bytes)
        yield Value(f"{side.scheme}, prefill", "tokens per second", side.prefill_tokens_per_s)
        yield Value(f"{side.scheme}, decode", "tokens per second", side.decode_tokens_per_s)


def _energy(study: Study, record: EnergyRecord) -> Values:
    estimated = "" if record.source == "nvml" else "estimated, not measured: not judged"
    yield Value("", "energy over baseline", record.energy_ratio, note=estimated)
    for side in (record.scheme_side, record.baseline_side):
        yield Value(side.scheme, "energy", side.joules_per_token)


def _append(study: Study, record: AppendRecord) -> Values:
    base = {
        (p.chunk, p.tokens): p.token_ms.median
        for p in record.points
        if p.series == study.baseline and p.token_ms
    }
    for point in record.points:
        part = f"{point.series}, {point.chunk} at {point.tokens:,} tokens"
        yield Value(part, "status", point.status)
        if point.token_ms is None:
            continue
        under = base.get((point.chunk, point.tokens))
        if under and point.series != study.baseline:
            yield Value(part, "append time over baseline", point.token_ms.median / under)
        yield Value(part, "time", point.token_ms.median)


def _kernels(study: Study, record: KernelRecord) -> Values:
    for part in record.parts:
        for side in part.sides:
            name = f"{part.measure}: {side.side}"
            yield Value(name, "status", side.status)
            if side.over_ours is not None and side.role != "ours":
                ends = side.over_ours.p10, side.over_ours.p90
                yield Value(name, "kernel time over ours", side.over_ours.median, ends)
            if side.role == "ours":
                yield Value(name, "share of copy bandwidth", side.copy_share)
            yield Value(name, "time", side.ms.median if side.ms else None)
            yield Value(name, "bits per element", side.bits_per_element)


def _job_baseline(study: Study, record: JobRecord) -> JobSide | None:
    """Returns the unquantized cache of a case: the preallocated one, or the growing one."""
    ran = [side for side in record.sides if side.status == "ok"]
    for kind in ("fp16-static", "fp16"):
        for side in ran:
            if study.scheme(side.scheme).kind == kind:
                return side
    return None


def _jobs(study: Study, record: JobRecord) -> Values:
    base = _job_baseline(study, record)
    compared = {
        "job speed over baseline": "job_tokens_per_s",
        "job energy over baseline": "joules_per_token",
    }
    for side in record.sides:
        yield Value(side.scheme, "status", side.status)
        if base is not None and side is not base:
            for quantity, field in compared.items():
                mine, theirs = getattr(side, field), getattr(base, field)
                estimated = "energy" in quantity and record.source != "nvml"
                note = "estimated, not measured: not judged" if estimated else ""
                if mine and theirs:
                    yield Value(side.scheme, quantity, mine / theirs, note=note)
            for field in ("capacity_tokens", "context_tokens"):
                mine, theirs = getattr(side, field), getattr(base, field)
                if mine and theirs:
                    part = f"{side.scheme}, {field.removesuffix('_tokens')}"
                    yield Value(part, "tokens held over baseline", mine / theirs)
        yield Value(side.scheme, "tokens per second", side.job_tokens_per_s)
        yield Value(side.scheme, "energy", side.joules_per_token)


EXTRACT: dict[str, Callable[[Study, Any], Values]] = {
    "throughput": _throughput,
    "energy": _energy,
    "append": _append,
    "kernels": _kernels,
    "jobs": _jobs,
}


def _subject(pair: Pair) -> Subject:
    names = pair.names
    rep = f", repetition {names['rep']}" if "rep" in names else ""
    what = str(names.get("workload", names.get("case", "append"))) + rep
    return Subject(
        pair.stage, str(names.get("model", "")), str(names.get("scheme", "")), what, 1,
        pair.quantizer, pair.published.device, pair.own.device, pair.published.versions,
        pair.own.versions,
    )  # fmt: skip


def _row(subject: Subject, theirs: Value, mine: Value) -> Row:
    kind = TOLERANCES[mine.quantity].kind
    note = theirs.note or mine.note
    if kind == "exact":
        return exact(subject, mine.quantity, theirs.value, mine.value)
    published, own = float(theirs.value), float(mine.value)
    if kind == "shown" or note:
        return shown(subject, mine.quantity, published, own, note)
    return ratio(subject, mine.quantity, published, own, mine.ends)


def timed_rows(study: Study, pairs: list[Pair]) -> list[Row]:
    """Returns the rows of everything that is timed; what only one side has is no row."""
    rows: list[Row] = []
    for pair in pairs:
        if pair.stage not in EXTRACT:
            continue
        subject = _subject(pair)
        theirs, mine = (
            {(v.part, v.quantity): v for v in EXTRACT[pair.stage](study, side.record)}
            for side in (pair.published, pair.own)
        )
        for key, value in mine.items():
            other = theirs.get(key)
            if other is None or value.value is None or other.value is None:
                continue
            part = ", ".join(filter(None, (subject.what, value.part)))
            rows.append(_row(replace(subject, what=part), other, value))
    return rows
