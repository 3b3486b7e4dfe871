"""What a tracker shows of a record: its identity, all its settings, and its numbers.

A record is a run. Its id follows from what it measures (the digest of its specification, and what
tells repetitions and names apart), so that a record which is logged again is the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from kvquant.analysis.problems import Problems
from kvquant.study import digests
from kvquant.study.config import Study, digest
from kvquant.study.records import (
    AppendRecord,
    EnergyRecord,
    EvalRecord,
    KernelRecord,
    Record,
    ThroughputRecord,
)
from kvquant.study.timing import TimedStage

# Fields of a record that say what was measured; numbers besides are results.
IDENTITY = ("model", "scheme", "task", "workload", "case", "device", "seed", "rep")
_SETTINGS = frozenset(
    {*IDENTITY, "schema_version", "kind", "study", "spec_digest", "environment", "inputs", "seal"}
)


@dataclass(frozen=True)
class Run:
    """A record as a tracker shows it.

    Attributes:
        id: Sixteen hexadecimal digits.
        name: Kind and place of the record, for readers.
        kind: Kind of the record, by which runs are grouped.
        seal: Seal of the record, which changes with any of its numbers.
        config: All settings, nested.
        summary: All numbers, by a path of their names.
    """

    id: str
    name: str
    kind: str
    seal: str
    config: dict[str, Any]
    summary: dict[str, float | int | bool | str]


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float | int | bool | str]]:
    """Yields the single values of nested content by their path; lists of numbers are left out.

    Args:
        value: Content of JSON.
        path: Where it stands.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            yield from numbers(part, f"{path}/{name}" if path else str(name))
    elif isinstance(value, list):
        for at, part in enumerate(value):
            if isinstance(part, dict):
                yield from numbers(part, f"{path}/{at}")
    elif value is not None:
        yield path, value


def _run(study: Study, record: Record, settings: dict[str, Any]) -> Run:
    content = record.model_dump(mode="json")
    identity = {name: content[name] for name in IDENTITY if name in content}
    kind = str(content["kind"])
    config = {"study": study.study, "kind": kind, **identity, **settings}
    config |= {name: content[name] for name in ("spec_digest", "inputs", "environment")}
    results = {name: part for name, part in content.items() if name not in _SETTINGS}
    return Run(
        id=digest(kind, study.study, identity, record.spec_digest),
        name="/".join(map(str, (kind, *identity.values()))),
        kind=kind,
        seal=record.seal,
        config=config,
        summary=dict(numbers(results)),
    )


def _spec(study: Study, model: str, scheme: str) -> dict[str, Any]:
    return {
        "model_spec": study.model(model).model_dump(mode="json"),
        "scheme_spec": study.scheme(scheme).model_dump(mode="json"),
        "calibration": study.calibration.model_dump(mode="json"),
    }


def _timed(stage: TimedStage, workload: str) -> dict[str, Any]:
    return {
        "workload_spec": stage.workloads[workload].model_dump(mode="json"),
        "timing": stage.model_dump(mode="json", exclude={"workloads", "schemes"}),
    }


def _read(
    problems: Problems, file: Path, kind: type[Record], expected: str, names: dict[str, Any]
) -> Record | None:
    return problems.read(file, kind, expected, names)


def runs(study: Study, results: Path, device: str, problems: Problems) -> Iterator[Run]:
    """Yields a run for every verified record of a study.

    Args:
        study: The study, which says which records there are.
        results: The study's folder of results.
        device: The device in the paths of timed records.
        problems: Collects problems, and says whether records may be missing.
    """
    for model, (scheme, task), seed in product(study.models, study.eval_cells(), study.seeds):
        file = results / "eval" / model / scheme / task / f"seed{seed}" / "run.json"
        names: dict[str, Any] = {"model": model, "scheme": scheme, "task": task, "seed": seed}
        expected = digests.eval_digest(study, model, scheme, task, seed)
        if record := _read(problems, file, EvalRecord, expected, names):
            task_spec = study.task(task).model_dump(mode="json")
            yield _run(study, record, _spec(study, model, scheme) | {"task_spec": task_spec})
    stages = (
        ("perf", ThroughputRecord, study.throughput, study.throughput_cells(), digests.perf_digest),
        ("energy", EnergyRecord, study.energy, study.energy_cells(), digests.energy_digest),
    )
    for folder, kind, stage, cells, digest_of in stages:
        for model, (scheme, workload, rep) in product(study.models, cells):
            file = results / folder / device / model / scheme / workload / f"rep{rep}.json"
            names = {"device": device, "model": model, "scheme": scheme, "workload": workload}
            expected = digest_of(study, model, scheme, workload)
            if record := _read(problems, file, kind, expected, names | {"rep": rep}):
                yield _run(study, record, _spec(study, model, scheme) | _timed(stage, workload))
    for rep in range(study.append_reps()):
        file = results / "append" / device / f"rep{rep}.json"
        names = {"device": device, "rep": rep}
        if record := _read(problems, file, AppendRecord, digests.append_digest(study), names):
            assert study.append is not None
            yield _run(study, record, {"append": study.append.model_dump(mode="json")})
    for name, case in study.kernel_cases().items():
        file = results / "kernels" / device / f"{name}.json"
        names = {"device": device, "case": name}
        expected = digests.kernels_digest(study, name)
        if record := _read(problems, file, KernelRecord, expected, names):
            assert study.kernels is not None
            timing = study.kernels.model_dump(mode="json", exclude={"cases"})
            spec = {"case_spec": case.model_dump(mode="json"), "timing": timing}
            scheme = study.kernel_scheme(case)
            schemes = {s: study.scheme(s).model_dump(mode="json") for s in (scheme, *case.peers)}
            yield _run(study, record, spec | {"scheme_specs": schemes})
