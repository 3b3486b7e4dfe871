"""`kvquant aggregate`: collects every configured record, verified, in tidy tables.

Records are the files of finished jobs and, where the study has some, published ones, also of other
devices. Nothing is dropped silently: a record that is missing, damaged, of another configuration or
without a finite value stops the collection, and all such files are named at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from kvquant.analysis.cost_rows import KEYS, append_rows, energy_rows, kernel_rows, throughput_rows
from kvquant.analysis.eval_rows import (
    EVAL_COLUMNS,
    SAMPLE_COLUMNS,
    SUITE_METRICS,
    eval_rows,
)
from kvquant.analysis.job_rows import job_rows
from kvquant.analysis.problems import Problems
from kvquant.analysis.sources import Sources
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from kvquant.study.config import Study, load_study

# Of tables without a row, which figures and claims read all the same.
APPEND_COLUMNS = ["device", "rep", "series", "chunk", "tokens", "status"]
KERNEL_COLUMNS = ["device", "case", "measure", "side", "role", "status"]
JOB_COLUMNS = ["device", "case", "gpus", "scheme", "status"]


def collect(
    study: Study, results: Path, device: str, problems: Problems | None = None
) -> dict[str, pd.DataFrame]:
    """Returns `eval`, `samples`, `perf`, `energy`, and `append`, `kernels`, `jobs` where measured.

    Args:
        study: The study, which says which records there are.
        results: The study's folder of results, beside which its published records count.
        device: The device in the paths of timed records.
        problems: Collects problems, and says whether records may be missing.

    Raises:
        UserError: One line for every record that cannot be used.
    """
    problems = Problems() if problems is None else problems
    sources = Sources(study, results, device)
    evaluations, samples = eval_rows(sources, problems)
    perf, energy = throughput_rows(sources, problems), energy_rows(sources, problems)
    appended, kernels = append_rows(sources, problems), kernel_rows(sources, problems)
    jobs = job_rows(sources, problems)
    if problems:
        raise UserError("\n".join(problems))
    order = list(KEYS)
    tables = {
        # as numbers, also where no task has the metric
        "eval": pd.DataFrame(evaluations, columns=list(EVAL_COLUMNS)).astype(
            dict.fromkeys(SUITE_METRICS, float)
        ),
        "samples": pd.DataFrame(samples, columns=list(SAMPLE_COLUMNS)).astype(
            dict.fromkeys(("row", "start", "tokens"), "Int64")
        ),
        "perf": pd.DataFrame(perf, columns=None if perf else order),
        "energy": pd.DataFrame(energy, columns=None if energy else order),
    }
    if study.append is not None:
        tables["append"] = pd.DataFrame(appended, columns=None if appended else APPEND_COLUMNS)
    if study.kernels is not None:
        tables["kernels"] = pd.DataFrame(kernels, columns=None if kernels else KERNEL_COLUMNS)
    if study.jobs is not None:
        tables["jobs"] = pd.DataFrame(jobs, columns=None if jobs else JOB_COLUMNS)
    return tables


def run(args: argparse.Namespace) -> None:
    """Collects and writes the tables."""
    problems = Problems(present=args.present)
    tables = collect(load_study(args.study), args.results, args.device_name, problems)
    for name, table in tables.items():
        write_table(table, args.out_dir / f"{name}.parquet")
        print(f"aggregate: {name}: {f'{len(table)} rows' if len(table) else 'nothing yet'}")
    if problems.missing:
        print(f"aggregate: {problems.missing} records are not there yet")
