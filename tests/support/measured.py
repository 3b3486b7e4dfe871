"""A small study of two models, mostly measured, as tests of pages of all results see it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from kvquant.analysis.collect import collect
from kvquant.analysis.explorer.data import data_of
from kvquant.analysis.explorer.source import Source, load
from kvquant.analysis.pareto import pareto_table
from kvquant.analysis.problems import Problems
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.analysis.tables import write_table
from kvquant.study.config import Study
from tests.support.studies import DEVICE, study_of, write_study
from tests.support.tables import job_table

HOSTILE = "</script><img src=x onerror=stop()> & \u2028"
TITLE = f"Tiny {HOSTILE}"
CASE: dict[str, Any] = {"shape": "7b-mha", "prompt": 4096, "answer": 64, "batch_size": 2}
CASE |= {"schemes": ["fp16", "nuq3"]}
LEFT_OUT = (
    "eval/other/kivi-4/passkey",
    "perf/gpu/tiny/nuq3/short/rep1.json",
    "energy/gpu/tiny/kivi-4",
)


class Measured(NamedTuple):
    """A study with its records and its collected tables."""

    study: Study
    results: Path
    source: Source
    data: dict[str, Any]


def measure(folder: Path) -> Measured:
    """All records but those of :data:`LEFT_OUT`, collected and tested, in an empty folder."""
    model = {"source": "local", "path": "model"}
    schemes: dict[str, Any] = {
        "fp16": {"kind": "fp16"},
        "nuq3": {"kind": "nuq", "bits": 3, "label": "3 bits <b>&amp;</b>"},
        "kivi-4": {"kind": "kivi", "bits": 4, "group": 16, "residual": 16},
        "hf-quanto-4": {"kind": "hf-quanto", "bits": 4},
    }
    study = study_of(
        title=TITLE,
        models={"tiny": model, "other": model | {"label": "Other model"}},
        schemes=schemes,
        evaluation={"tasks": {"kivi-4": ["ppl", "passkey", "ruler"]}},
        jobs={"cases": {"two": CASE | {"energy": True}, "rest": CASE | {"batch_size": 3}}},
        statistics={"bootstrap": 100},
    )
    write_study(study, folder)
    for name in LEFT_OUT:
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    tables = collect(study, folder, DEVICE, Problems(present=True))
    jobs = job_table(study)
    tables["jobs"] = jobs[jobs.case == "two"]
    evaluations = tables["eval"]
    tables["tests"] = compare_all(study, evaluations, tables["samples"])
    tables["pareto"] = pareto_table(study, evaluations, tables["perf"], tables["energy"])
    for name, table in tables.items():
        write_table(table, folder / "tables" / f"{name}.parquet")
    source = load(study, folder / "tables")
    return Measured(study, folder, source, data_of(source))
