"""Rows of the collected table `jobs`, from verified records of whole jobs: a row per cache."""

from __future__ import annotations

from typing import Any

from kvquant.analysis.problems import Problems
from kvquant.analysis.provenance import short
from kvquant.analysis.sources import Sources
from kvquant.analysis.spec_checks import check_jobs
from kvquant.study.records import JobRecord, JobSide

SHARED = (
    *("device", "case", "shape", "prompt", "answer", "gpus", "memory_bytes", "emulated"),
    *("weight_bytes", "source", "method", "idle_watts", "counter_over_power"),
)


def _ends(name: str, values: list[float]) -> dict[str, float | None]:
    """Returns the lowest and the highest of what trials gave."""
    return {f"{name}_low": min(values, default=None), f"{name}_high": max(values, default=None)}


def _spreads(side: JobSide, prompt: int, answer: int) -> dict[str, Any]:
    """Returns times with their spread, and the ends of what trials gave."""
    row: dict[str, Any] = {}
    for name in ("first_token_ms", "step_ms"):
        times = getattr(side, name)
        for part in ("median", "p10", "p90", "p99", "n"):
            row[f"{name}_{part}"] = getattr(times, part) if times else None
    prompts = (side.batch_size or 0) * prompt
    tokens = (side.batch_size or 0) * (prompt + answer)
    seconds = [(t.prefill_seconds + t.decode_seconds) / t.jobs for t in side.trials]
    row |= _ends("job_seconds", seconds)
    row |= _ends("job_tokens_per_s", [tokens / s for s in seconds])
    decoding = [(side.batch_size or 0) * answer * t.jobs / t.decode_seconds for t in side.trials]
    row |= _ends("decode_tokens_per_s", decoding)
    joules = [
        (t.prefill_joules / t.jobs, t.decode_joules / t.jobs)
        for t in side.trials
        if t.prefill_joules is not None and t.decode_joules is not None
    ]
    row |= _ends("joules_per_token", [sum(both) / tokens for both in joules])
    row |= _ends("joules_per_prompt_token", [first / prompts for first, _ in joules])
    answers = tokens - prompts
    row |= _ends("joules_per_answer_token", [second / answers for _, second in joules])
    return row | {"trials": len(side.trials), "jobs": sum(t.jobs for t in side.trials)}


def job_rows(sources: Sources, problems: Problems) -> list[dict[str, Any]]:
    """Returns a row per cache of a case; none for a study that measures no whole jobs."""
    rows: list[dict[str, Any]] = []
    for source, record in problems.verified(sources, "jobs", JobRecord, check_jobs):
        problems.once(source, "jobs", [t.model_dump() for s in record.sides for t in s.trials])
        shared = {name: getattr(record, name) for name in SHARED}
        shared["record"] = short(record.seal)
        for side in record.sides:
            plain = side.model_dump(exclude={"trials", "first_token_ms", "step_ms"})
            rows.append(shared | plain | _spreads(side, record.prompt, record.answer))
    return rows
