"""`kvquant aggregate`: collects every configured record, verified, in tidy tables.

Nothing is dropped silently: a record that is missing, damaged, of another configuration or without
a finite value stops the collection, and all such files are named at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from kvquant.analysis.cost_rows import append_rows, kernel_rows, timed_rows
from kvquant.analysis.eval_rows import SUITE_METRICS, eval_rows
from kvquant.analysis.problems import Problems
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from kvquant.study.config import Study, load_study


def collect(
    study: Study, results: Path, device: str, problems: Problems | None = None
) -> dict[str, pd.DataFrame]:
    """Returns `eval`, `samples`, `perf`, `energy`, and `append` and `kernels` where measured.

    Args:
        study: The study, which says which records there are.
        results: The study's folder of results.
        device: The device in the paths of timed records.
        problems: Collects problems, and says whether records may be missing.

    Raises:
        UserError: One line for every record that cannot be used.
    """
    problems = Problems() if problems is None else problems
    evaluations, samples = eval_rows(study, results, problems)
    perf, energy = timed_rows(study, results, device, problems)
    appended = append_rows(study, results, device, problems)
    kernels = kernel_rows(study, results, device, problems)
    if problems:
        raise UserError("\n".join(problems))
    order = ["device", "model", "scheme", "workload", "rep"]
    table = pd.DataFrame(evaluations)
    tables = {
        # as numbers, also where no task has the metric
        "eval": table.astype(dict.fromkeys(SUITE_METRICS, float)) if evaluations else table,
        "samples": pd.DataFrame(samples).astype(
            dict.fromkeys(("row", "start", "tokens"), "Int64") if samples else {}
        ),
        "perf": pd.DataFrame(perf, columns=None if perf else order),
        "energy": pd.DataFrame(energy, columns=None if energy else order),
    }
    if study.append is not None:
        tables["append"] = pd.DataFrame(appended)
    if study.kernels is not None:
        tables["kernels"] = pd.DataFrame(kernels)
    return tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant aggregate`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--results", required=True, type=Path, help="the study's results folder")
    parser.add_argument("--device-name", required=True, help="device in perf and energy paths")
    parser.add_argument("--out-dir", required=True, type=Path)
    parser.add_argument(
        "--present", action="store_true", help="of an unfinished study, what is measured so far"
    )


def run(args: argparse.Namespace) -> None:
    """Collects and writes the tables."""
    problems = Problems(present=args.present)
    tables = collect(load_study(args.study), args.results, args.device_name, problems)
    for name, table in tables.items():
        if args.present and table.empty:
            print(f"aggregate: {name}: nothing yet")
            continue
        write_table(table, args.out_dir / f"{name}.parquet")
        print(f"aggregate: {name}: {len(table)} rows")
    if problems.missing:
        print(f"aggregate: {problems.missing} records are not there yet")
