"""What a tracker shows of a record: its identity, all its settings, and its numbers.

A record is a run. Its id follows from what it measures (the digest of its specification, and what
tells repetitions and names apart), so that a record which is logged again is the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kvquant.analysis.problems import Problems
from kvquant.analysis.sources import Sources
from kvquant.study.cells import Cell
from kvquant.study.config import Study, digest
from kvquant.study.records import Record
from kvquant.study.seal import KINDS
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
        "calibration": study.calibrated_by(study.calibration_name(scheme)).model_dump(mode="json"),
    }


def _timed(stage: TimedStage, workload: str) -> dict[str, Any]:
    return {
        "workload_spec": stage.workloads[workload].model_dump(mode="json"),
        "timing": stage.model_dump(mode="json", exclude={"workloads", "schemes"}),
    }


def _cased(spec: BaseModel, case: BaseModel) -> dict[str, Any]:
    timing = spec.model_dump(mode="json", exclude={"cases"})
    return {"case_spec": case.model_dump(mode="json"), "timing": timing}


def _schemes(study: Study, names: Sequence[str]) -> dict[str, Any]:
    return {"scheme_specs": {s: study.scheme(s).model_dump(mode="json") for s in names}}


def _settings(study: Study, cell: Cell) -> dict[str, Any]:
    """Returns all settings of a cell that its record was measured with."""
    names = cell.names
    if cell.stage == "eval":
        task = study.task(names["task"]).model_dump(mode="json")
        return _spec(study, names["model"], names["scheme"]) | {"task_spec": task}
    if cell.stage in ("throughput", "energy"):
        stage: TimedStage = getattr(study, cell.stage)
        spec = _spec(study, names["model"], names["scheme"])
        return spec | _timed(stage, names["workload"])
    if cell.stage == "append":
        assert study.append is not None
        return {"append": study.append.model_dump(mode="json")}
    if cell.stage == "kernels":
        assert study.kernels is not None
        case = study.kernel_cases()[names["case"]]
        schemes = (study.kernel_scheme(case), *case.peers)
        return _cased(study.kernels, case) | _schemes(study, schemes)
    assert study.jobs is not None
    job = study.job_cases()[names["case"]]
    return _cased(study.jobs, job) | _schemes(study, job.schemes)


def runs(study: Study, results: Path, device: str, problems: Problems) -> Iterator[Run]:
    """Yields a run for every verified record of a study, published ones included.

    Args:
        study: The study, which says which records there are.
        results: The study's folder of results.
        device: The device in the paths of timed records.
        problems: Collects problems, and says whether records may be missing.
    """
    sources = Sources(study, results, device)
    for stage, kind in KINDS.items():
        for cell in sources.cells(stage):
            record: Record | None = problems.read(sources.find(cell), cell, kind)
            if record is not None:
                yield _run(study, record, _settings(study, cell))
