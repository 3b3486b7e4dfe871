"""Checks that a record is what its study asks for, beyond what its digest says.

All functions raise ValueError with the field's name.
"""

from __future__ import annotations

from typing import Any

from kvquant.study.config import Study
from kvquant.study.digests import asks_prompts
from kvquant.study.prompt_lengths import prompt_lengths
from kvquant.study.records import (
    AppendRecord,
    EnergyRecord,
    EvalRecord,
    JobRecord,
    KernelRecord,
    Record,
    ThroughputRecord,
)
from kvquant.study.suite import AnsweredTask


def _are(record: Any, expected: dict[str, Any]) -> None:
    for field, right in expected.items():
        found: Any = record
        for part in field.split("."):
            found = getattr(found, part)
        if found != right:
            raise ValueError(f"field '{field}': is {found!r}, but the study's is {right!r}")


def _check_gpus(record: Record, asked: int) -> None:
    """Checks the number of GPUs that a timed record lists; a record of a processor lists none."""
    listed = record.environment.get("gpus") or []
    if listed and len(listed) != max(1, asked):
        raise ValueError(
            f"field 'environment.gpus': lists {len(listed)}, but the study asks for {max(1, asked)}"
        )


def check_evaluation(study: Study, record: EvalRecord) -> None:
    """Checks suite, protocol, number of samples and further metrics of an evaluation."""
    task = study.task(record.task)
    _are(record, {"suite": task.suite, "protocol": task.cache_protocol()})
    _are(record, {"prompt_attention": study.scheme(record.scheme).prompt_attention})
    if not asks_prompts(task):
        _are(record, {"prompts_sha256": None})
    elif record.prompts_sha256 is None:
        raise ValueError("field 'prompts_sha256': is missing")
    task.check_metrics(record.metrics)
    asked = task.samples_expected(record.metrics)
    if asked and record.samples != asked:
        raise ValueError(f"field 'samples': is {record.samples}, but the study asks for {asked}")
    if isinstance(task, AnsweredTask) and record.tokens > record.samples * task.length:
        raise ValueError(f"field 'tokens': prompts are longer than the task's {task.length}")


def check_throughput(study: Study, record: ThroughputRecord) -> None:
    """Checks the sides, the prompts and the number of GPUs of a throughput record."""
    _check_gpus(record, study.model(record.model).gpus)
    workload = study.throughput.workloads[record.workload]
    _are(
        record,
        {
            "scheme_side.scheme": record.scheme,
            "baseline_side.scheme": study.baseline,
            "batch_size": workload.batch_size,
            "prompt_tokens": sum(prompt_lengths(workload)),
        },
    )
    for name in ("scheme_side", "baseline_side"):
        side = getattr(record, name)
        if side.status == "ok" and (side.decode_ms is None) != (workload.answer == 0):
            raise ValueError(f"field '{name}.decode_ms': answers have {workload.answer} tokens")


def check_energy(study: Study, record: EnergyRecord) -> None:
    """Checks the sides of an energy record, their trials and GPUs, and tokens of whole jobs."""
    _check_gpus(record, study.model(record.model).gpus)
    workload = study.energy.workloads[record.workload]
    _are(
        record,
        {"scheme_side.scheme": record.scheme, "baseline_side.scheme": study.baseline},
    )
    job = sum(prompt_lengths(workload)) + workload.batch_size * workload.answer
    for name in ("scheme_side", "baseline_side"):
        side = getattr(record, name)
        if len(side.joules) != study.energy.trials:
            raise ValueError(
                f"field '{name}.joules': {len(side.joules)} trials, not {study.energy.trials}"
            )
        if any(tokens % job for tokens in side.tokens):
            raise ValueError(f"field '{name}.tokens': are not whole jobs of {job} tokens")


def check_append(study: Study, record: AppendRecord) -> None:
    """Checks the shape of an append record, and that it has every size of every chunk."""
    spec = study.append
    assert spec is not None
    _are(record, {n: getattr(spec, n) for n in ("batch_size", "kv_heads", "head_dim")})
    if {p.chunk for p in record.points} != set(spec.chunks):
        raise ValueError(f"field 'points.chunk': the study's are {spec.chunks}")
    if {p.tokens for p in record.points} != set(spec.sizes):
        raise ValueError(f"field 'points.tokens': the study's are {spec.sizes}")
    series = len({p.series for p in record.points})
    if series != len(study.append_schemes()) + spec.concatenation:
        raise ValueError("field 'points.series': are not the study's schemes")
    if len(record.points) != series * len(spec.chunks) * len(spec.sizes):
        raise ValueError("field 'points': one of a series, chunk and size is missing")


def check_kernels(study: Study, record: KernelRecord) -> None:
    """Checks the shape and the measurements of a kernel record's case."""
    case = study.kernel_cases()[record.case]
    shape = {name: getattr(case, name) for name in ("shape", "batch", "tokens")}
    _are(record, {**shape, "scheme": study.kernel_scheme(case)})
    if [part.measure for part in record.parts] != case.measure:
        raise ValueError(f"field 'parts.measure': the study's are {', '.join(case.measure)}")


def check_jobs(study: Study, record: JobRecord) -> None:
    """Checks the shape, the lengths and the caches of a case of whole jobs."""
    case = study.job_cases()[record.case]
    asked = {name: getattr(case, name) for name in ("shape", "prompt", "answer")}
    _are(record, {**asked, "gpus": case.num_gpus, "split": case.split})
    _check_gpus(record, case.num_gpus)
    if [side.scheme for side in record.sides] != case.schemes:
        raise ValueError(f"field 'sides.scheme': the study's are {', '.join(case.schemes)}")
    if case.energy == (record.source is None):
        raise ValueError(f"field 'source': is {record.source!r}, but energy is {case.energy}")
    sizes = {side.batch_size for side in record.sides if side.status == "ok"}
    if case.batch_size is not None and sizes - {case.batch_size}:
        raise ValueError(f"field 'sides.batch_size': the study's is {case.batch_size}")
