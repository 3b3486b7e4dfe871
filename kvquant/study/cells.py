"""The cells of a study: each result that it asks for, with its place and what it depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from kvquant.study.config import Study
from kvquant.study.digests import (
    append_digest,
    energy_digest,
    eval_digest,
    jobs_digest,
    kernels_digest,
    perf_digest,
)
from kvquant.study.places import place_of

STAGES = ("eval", "throughput", "energy", "append", "kernels", "jobs")  # kinds of records


@dataclass(frozen=True)
class Cell:
    """A result that a study asks for.

    Attributes:
        stage: The kind of its record.
        names: The record's fields that its place names.
        digest: Digest of the specification that it depends on.
    """

    stage: str
    names: dict[str, Any]
    digest: str

    @property
    def place(self) -> str:
        """Returns the path of the record's file below the results folder."""
        return place_of(self.stage, self.names)


def cells_of(study: Study, stage: str, device: str) -> Iterator[Cell]:
    """Yields the cells of a stage in the order of the study.

    Args:
        study: The study.
        stage: One of :data:`STAGES`.
        device: The device of what is timed.
    """
    on: dict[str, Any] = {"device": device}
    if stage == "eval":
        for model, scheme, task, seed in product(
            study.models, study.schemes, study.tasks, study.seeds
        ):
            if study.evaluates(scheme, task):
                names = {"model": model, "scheme": scheme, "task": task, "seed": seed}
                yield Cell(stage, names, eval_digest(study, model, scheme, task, seed))
    elif stage == "append":
        for rep in range(study.append_reps()):
            yield Cell(stage, on | {"rep": rep}, append_digest(study))
    elif stage == "kernels":
        for case in study.kernel_cases():
            yield Cell(stage, on | {"case": case}, kernels_digest(study, case))
    elif stage == "jobs":
        for case in study.job_cases():
            yield Cell(stage, on | {"case": case}, jobs_digest(study, case))
    else:
        timed, digest = (
            (study.throughput_cells(), perf_digest)
            if stage == "throughput"
            else (study.energy_cells(), energy_digest)
        )
        for model in study.models:
            for scheme, workload, rep in timed:
                names = {"model": model, "scheme": scheme, "workload": workload, "rep": rep}
                yield Cell(stage, on | names, digest(study, model, scheme, workload))
