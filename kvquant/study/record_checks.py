"""Checks that the derived fields of a record (rates, ratios, shares) follow from the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from kvquant.study.jobs import SEARCHED
from kvquant.study.percentiles import percentile
from kvquant.study.record_types import (
    AppendRecord,
    EnergyRecord,
    EnergySide,
    EvalRecord,
    JobRecord,
    JobSide,
    KernelPart,
    KernelRecord,
    KernelSide,
    Percentiles,
    PerfSide,
    ThroughputRecord,
)

TOLERANCE = 1e-9  # relative
LEVELS = {"p10": 100, "median": 500, "p90": 900, "p99": 990}  # in thousandths


def _follows(field: str, found: float | None, expected: float | None) -> None:
    """Raises ValueError unless a number equals the one that other fields give."""
    if found is None and expected is None:
        return
    if (
        found is None
        or expected is None
        or not math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=1e-12)
    ):
        right = "none" if expected is None else f"{expected:.10g}"
        raise ValueError(
            f"field '{field}': is {found}, but the record's other numbers give {right}"
        )


def _at_least(field: str, found: float | None, least: float) -> None:
    if found is not None and found < least:
        raise ValueError(f"field '{field}': is {found}, less than {least:g}")


def _spread(field: str, times: Percentiles | None, rounds: list[float] | None = None) -> None:
    if times is None:
        return
    _at_least(f"{field}.n", times.n, 1)
    _at_least(f"{field}.p10", times.p10, 0)
    slack = 1 + TOLERANCE
    if not times.p10 <= times.median * slack <= times.p90 * slack**2 <= times.p99 * slack**3:
        raise ValueError(f"field '{field}': p10, median, p90 and p99 do not ascend")
    if rounds is not None:
        _follows(f"{field}.n", times.n, len(rounds))
        for name, level in LEVELS.items():
            _follows(f"{field}.{name}", getattr(times, name), percentile(rounds, level))


def _bits(field: str, side: Any) -> None:
    for name in ("cache_bytes", "cache_elements"):
        _at_least(f"{field}{name}", getattr(side, name), 1)
    if side.cache_elements is not None and side.cache_bytes is not None:
        bits = 8 * side.cache_bytes / side.cache_elements
        _follows(f"{field}bits_per_element", side.bits_per_element, bits)


def _evaluation(record: EvalRecord) -> None:
    for name, least in (("seed", 0), ("samples", 1), ("tokens", 1), ("seconds", 0)):
        _at_least(name, getattr(record, name), least)
    _bits("", record)
    _follows("value", record.value, record.metrics.get(record.metric))
    if record.inputs.get("prompts", record.prompts_sha256) != record.prompts_sha256:
        raise ValueError("field 'prompts_sha256': is not the hash among the inputs")


def _timed_side(field: str, side: PerfSide, record: ThroughputRecord) -> None:
    if side.status != "ok":
        if held := sorted(side.model_dump(exclude={"scheme", "status"}, exclude_none=True)):
            raise ValueError(
                f"field '{field}.{held[0]}': is there, but the status is {side.status}"
            )
        return
    if side.prefill_ms is None:
        raise ValueError(f"field '{field}.prefill_ms': is missing, but the status is ok")
    _spread(f"{field}.prefill_ms", side.prefill_ms, side.prefill_rounds_ms)
    _spread(f"{field}.decode_ms", side.decode_ms)
    _spread(f"{field}.quantize_ms", side.quantize_ms)
    rate = record.prompt_tokens / side.prefill_ms.median * 1e3
    _follows(f"{field}.prefill_tokens_per_s", side.prefill_tokens_per_s, rate)
    steps = record.batch_size / side.decode_ms.median * 1e3 if side.decode_ms else None
    _follows(f"{field}.decode_tokens_per_s", side.decode_tokens_per_s, steps)
    _bits(f"{field}.", side)


def _throughput(record: ThroughputRecord) -> None:
    for name, least in (("rep", 0), ("prompt_tokens", 1), ("batch_size", 1)):
        _at_least(name, getattr(record, name), least)
    ours, base = record.scheme_side, record.baseline_side
    _named("scheme_side.scheme", ours.scheme, record.scheme)
    for field, side in (("scheme_side", ours), ("baseline_side", base)):
        _timed_side(field, side, record)
    if ours.prefill_ms is None or base.prefill_ms is None:
        _follows("prefill_ratio", record.prefill_ratio, None)
        _follows("quantize_share", record.quantize_share, None)
        return
    ratio = record.prefill_ratio
    if ours.prefill_rounds_ms is not None and base.prefill_rounds_ms is not None:
        if len(ours.prefill_rounds_ms) != len(base.prefill_rounds_ms):
            raise ValueError("field 'prefill_rounds_ms': the sides differ in number of rounds")
        pairs = zip(base.prefill_rounds_ms, ours.prefill_rounds_ms, strict=True)
        ratio = statistics.median(b / s for b, s in pairs)
    _follows("prefill_ratio", record.prefill_ratio, ratio)
    _at_least("prefill_ratio", record.prefill_ratio, 0)
    share = ours.quantize_ms.median / base.prefill_ms.median if ours.quantize_ms else None
    _follows("quantize_share", record.quantize_share, share)


def _named(field: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"field '{field}': is '{found}', but the record's is '{expected}'")


def _energy_side(field: str, side: EnergySide, idle_watts: float) -> None:
    trials = {len(side.joules), len(side.joules_above_idle), len(side.seconds), len(side.tokens)}
    if trials != {len(side.joules)} or not side.joules:
        raise ValueError(f"field '{field}': lists of trials are not equally long")
    for name, values, least in (
        ("joules", side.joules, 0.0),
        ("seconds", side.seconds, 0.0),
        ("tokens", side.tokens, 1.0),
    ):
        _at_least(f"{field}.{name}", min(values), least)
    for joules, above, seconds in zip(
        side.joules, side.joules_above_idle, side.seconds, strict=True
    ):
        _follows(f"{field}.joules_above_idle", above, joules - idle_watts * seconds)
    tokens = sum(side.tokens)
    _follows(f"{field}.joules_per_token", side.joules_per_token, sum(side.joules) / tokens)
    above = sum(side.joules_above_idle) / tokens
    _follows(f"{field}.joules_per_token_above_idle", side.joules_per_token_above_idle, above)


def _energy(record: EnergyRecord) -> None:
    _at_least("rep", record.rep, 0)
    _at_least("idle_watts", record.idle_watts, 0)
    ours, base = record.scheme_side, record.baseline_side
    _named("scheme_side.scheme", ours.scheme, record.scheme)
    for field, side in (("scheme_side", ours), ("baseline_side", base)):
        _energy_side(field, side, record.idle_watts)
    if base.joules_per_token <= 0:
        raise ValueError("field 'baseline_side.joules_per_token': is not positive")
    ratio = ours.joules_per_token / base.joules_per_token
    _follows("energy_ratio", record.energy_ratio, ratio)
    counted = record.method.startswith("GPU board energy")
    guessed = record.method.startswith(("estimate", "rapl")) or record.device == "cpu"
    if (counted and record.source != "nvml") or (guessed and record.source == "nvml"):
        raise ValueError(
            f"field 'source': is '{record.source}', which contradicts the method ({record.method})"
        )


def _append(record: AppendRecord) -> None:
    _at_least("rep", record.rep, 0)
    places = [(p.series, p.chunk, p.tokens) for p in record.points]
    if len(set(places)) != len(places):
        raise ValueError("field 'points': one is given twice")
    for point in record.points:
        where = f"points.{point.series}"
        times = (point.token_ms, point.call_ms, point.cache_bytes)
        if any((part is None) == (point.status == "ok") for part in times):
            raise ValueError(
                f"field '{where}.status': is '{point.status}', which contradicts the times"
            )
        _spread(f"{where}.token_ms", point.token_ms)
        _spread(f"{where}.call_ms", point.call_ms)


def _kernel_side(side: KernelSide, part: KernelPart, copy: float | None) -> None:
    where = f"parts.{part.measure}.{side.side}"
    if side.ms is None:
        held = sorted(
            side.model_dump(exclude={"side", "role", "status", "reason"}, exclude_none=True)
        )
        if held or side.status == "ok":
            what = f".{held[0]}': is there without a time" if held else ".ms': is missing"
            raise ValueError(f"field '{where}{what} (status {side.status})")
        return
    if side.status != "ok":
        raise ValueError(f"field '{where}.ms': is there, but the status is '{side.status}'")
    _spread(f"{where}.ms", side.ms)
    _spread(f"{where}.over_ours", side.over_ours)
    rate = share = floor = None
    if side.nbytes is not None:
        rate = side.nbytes / side.ms.median / 1e6
        if copy is not None:
            share, floor = rate / copy, side.nbytes / copy / 1e6
    _follows(f"{where}.gb_per_s", side.gb_per_s, rate)
    _follows(f"{where}.copy_share", side.copy_share, share)
    _follows(f"{where}.floor_ms", side.floor_ms, floor)


def _kernels(record: KernelRecord) -> None:
    for name in ("batch", "tokens"):
        _at_least(name, getattr(record, name), 1)
    max_tokens = record.batch * record.tokens
    if not record.tokens <= record.all_tokens <= max_tokens:
        raise ValueError(f"field 'all_tokens': is not from {record.tokens} to {max_tokens}")
    measures = [part.measure for part in record.parts]
    if len(set(measures)) != len(measures):
        raise ValueError("field 'parts': one is given twice")
    for part in record.parts:
        copy = part.copy_gb_per_s
        for side in part.sides:
            if side.role == "copy" and side.gb_per_s is not None:
                copy = side.gb_per_s if copy is None else copy
                _follows(f"parts.{part.measure}.copy_gb_per_s", copy, side.gb_per_s)
        for side in part.sides:
            _kernel_side(side, part, copy)


def _job_side(side: JobSide, record: JobRecord) -> None:
    where = f"sides.{side.scheme}"
    if side.status != "ok":
        free = {"scheme", "status", *SEARCHED, "formula_tokens"}
        if held := [k for k, v in side.model_dump(exclude=free, exclude_none=True).items() if v]:
            raise ValueError(
                f"field '{where}.{held[0]}': is there, but the status is {side.status}"
            )
        return
    if not side.trials or side.batch_size is None:
        raise ValueError(f"field '{where}.trials': is missing, but the status is ok")
    _at_least(f"{where}.batch_size", side.batch_size, 1)
    for name, times in (("first_token_ms", side.first_token_ms), ("step_ms", side.step_ms)):
        _spread(f"{where}.{name}", times)
    _bits(f"{where}.", side)
    peaks = side.gpu_peak_bytes
    if peaks is not None and (len(peaks), sum(peaks)) != (record.gpus, side.peak_bytes):
        raise ValueError(f"field '{where}.gpu_peak_bytes': are not those of {record.gpus} GPUs")
    jobs = sum(trial.jobs for trial in side.trials)
    prompts = jobs * side.batch_size * record.prompt
    answers = jobs * side.batch_size * record.answer
    prefill = sum(trial.prefill_seconds for trial in side.trials)
    decode = sum(trial.decode_seconds for trial in side.trials)
    _at_least(f"{where}.trials", min(t.jobs for t in side.trials), 1)
    _follows(f"{where}.prefill_tokens_per_s", side.prefill_tokens_per_s, prompts / prefill)
    _follows(f"{where}.decode_tokens_per_s", side.decode_tokens_per_s, answers / decode)
    rate = (prompts + answers) / (prefill + decode)
    _follows(f"{where}.job_tokens_per_s", side.job_tokens_per_s, rate)
    joules = [(t.prefill_joules, t.decode_joules) for t in side.trials]
    derived: list[float | None] = [None] * 4
    if record.source is not None:
        if any(x is None for pair in joules for x in pair) or record.idle_watts is None:
            raise ValueError(f"field '{where}.trials': a trial is without joules")
        first, second = (sum(float(p[i] or 0) for p in joules) for i in (0, 1))
        above = first + second - record.idle_watts * (prefill + decode)
        derived = [
            first / prompts,
            second / answers,
            (first + second) / (prompts + answers),
            above / (prompts + answers),
        ]
    names = ("prompt_token", "answer_token", "token", "token_above_idle")
    for name, value in zip(names, derived, strict=True):
        _follows(f"{where}.joules_per_{name}", getattr(side, f"joules_per_{name}"), value)


def _jobs(record: JobRecord) -> None:
    for name in ("prompt", "answer", "gpus", "memory_bytes", "weight_bytes"):
        _at_least(name, getattr(record, name), 1)
    names = [side.scheme for side in record.sides]
    if len(set(names)) != len(names):
        raise ValueError("field 'sides': one is given twice")
    if (record.source == "nvml") != record.method.startswith("GPU board energy"):
        raise ValueError(
            f"field 'source': is '{record.source}', which contradicts the method ({record.method})"
        )
    for side in record.sides:
        _job_side(side, record)


def check_record(record: Any) -> None:
    """Recomputes the derived fields of a record from its own other fields.

    Raises:
        ValueError: A field contradicts the others; the message names it.
    """
    checks: dict[type[Any], Callable[[Any], None]] = {
        EvalRecord: _evaluation,
        ThroughputRecord: _throughput,
        EnergyRecord: _energy,
        AppendRecord: _append,
        KernelRecord: _kernels,
        JobRecord: _jobs,
    }
    if check := checks.get(type(record)):
        check(record)
