"""`kvquant pareto`: puts accuracy, bits, speed and energy of every scheme side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from kvquant.analysis.tables import read_table, write_table
from kvquant.analysis.timed_on import device_of, one_device
from kvquant.study.config import Study, load_study
from kvquant.study.suite import likelihood_suites
from kvquant.study.tasks import SUITES
from kvquant.study.timing import TimedStage


def dominated(costs: np.ndarray) -> np.ndarray:
    """Returns which rows another row beats.

    A row is dominated if another is at least as good on every axis that the first was measured on,
    and better on one. A row that misses one of those axes cannot dominate.

    Args:
        costs: `[rows, axes]`, smaller is better, NaN for not measured.

    Returns:
        bool `[rows]`.
    """
    n = len(costs)
    out = np.zeros(n, dtype=bool)
    for i in range(n):
        for j in range(n):
            axes = ~np.isnan(costs[i])
            if i == j or not axes.any() or np.isnan(costs[j][axes]).any():
                continue
            mine, other = costs[i][axes], costs[j][axes]
            if (other <= mine).all() and (other < mine).any():
                out[i] = True
    return out


def first_workload(spec: TimedStage, *, answered: bool = False) -> str | None:
    """Returns the workload that stands for a stage where one number is asked for: the first.

    Args:
        spec: The stage.
        answered: Of those that decode an answer.
    """
    names = [name for name, w in spec.workloads.items() if w.answer > 0 or not answered]
    return names[0] if names else None


def counted(energy: pd.DataFrame) -> pd.DataFrame:
    """Returns the energy rows that counters measured; estimates err by more than schemes differ."""
    return energy[energy["source"] != "estimated"] if "source" in energy else energy


def _bits(rows: pd.DataFrame) -> float:
    """Returns bits per element; NaN for a scheme that is only timed."""
    return 8 * rows.cache_bytes.sum() / rows.cache_elements.sum() if len(rows) else np.nan


def pareto_table(
    study: Study, evaluations: pd.DataFrame, perf: pd.DataFrame, energy: pd.DataFrame
) -> pd.DataFrame:
    """Returns a row per (model, scheme).

    `bits_per_element` is that of the first perplexity task, or of all tasks without one: contexts
    of one length, so that schemes are compared under the same share of 16-bit tokens. `kl` is the
    mean over perplexity tasks; it does not count for dominance, as perplexity shows that damage.
    Speeds are of the study's first throughput workload (decode: of the first with an answer),
    energy is of the first energy workload and only where counters measured it; medians over
    repetitions. Each is of one device, which `timed_on` and `metered_on` name.
    """
    perf, energy = one_device(study, perf), one_device(study, energy)
    timed_on, metered_on = device_of(study, perf), device_of(study, energy)
    prefill, energy_of = first_workload(study.throughput), first_workload(study.energy)
    decode = first_workload(study.throughput, answered=True)
    measured = counted(energy)
    rows = []
    for model in study.models:
        for scheme in study.schemes:
            mine = evaluations[(evaluations.model == model) & (evaluations.scheme == scheme)]
            base = evaluations[
                (evaluations.model == model) & (evaluations.scheme == study.baseline)
            ]
            row: dict[str, object] = {"model": model, "scheme": scheme}
            spec = study.schemes[scheme]
            for kept in ("sinks", "residual"):  # first and most recent tokens in 16 bits
                row[kept] = getattr(spec, kept, 0) if spec.quantizes else np.nan
            for suite in SUITES:
                values = mine[mine.suite == suite].groupby("task")["value"].mean()
                reference = base[base.suite == suite].groupby("task")["value"].mean()
                row[suite] = values.mean() if len(values) else np.nan
                row[f"{suite}_change"] = (values - reference).mean() if len(values) else np.nan
            language = mine[mine.suite.isin(likelihood_suites())]
            row["kl"] = language["kl"].mean() if "kl" in language else np.nan
            sized = language if len(language) else mine
            row["bits_per_element"] = _bits(sized)
            row["bits_all_tasks"] = _bits(mine)
            for column, table, workload in (
                ("prefill_ratio", perf, prefill),
                ("decode_ratio", perf, decode),
                ("quantize_share", perf, prefill),
                ("energy_ratio", measured, energy_of),
            ):
                row[column] = np.nan
                if column not in table:
                    continue
                there = table[(table.model == model) & (table.workload == workload)]
                if scheme == study.baseline and there[column].notna().any():
                    row[column] = 0.0 if column == "quantize_share" else 1.0
                chosen = there[there.scheme == scheme][column].astype(float).dropna()
                if len(chosen):
                    row[column] = chosen.median()
            row["prefill_workload"] = prefill or ""
            row["energy_workload"] = energy_of or ""
            row |= {"timed_on": timed_on or "", "metered_on": metered_on or ""}
            there = energy[energy.model == model] if "source" in energy else energy
            sources: list[str] = list(there["source"].unique()) if len(there) else []
            row["energy_source"] = ",".join(sorted(sources)) or "not measured"
            rows.append(row)
    table = pd.DataFrame(rows)
    table["dominated"] = False
    for model in study.models:
        mine = table["model"] == model
        costs = np.column_stack(
            [
                *(
                    table.loc[mine, f"{name}_change"] * (-1 if suite.higher_is_better else 1)
                    for name, suite in SUITES.items()
                ),
                table.loc[mine, "bits_per_element"],
                -table.loc[mine, "prefill_ratio"],
                table.loc[mine, "energy_ratio"],
            ]
        ).astype(float)
        table.loc[mine, "dominated"] = dominated(costs)
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `kvquant pareto`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument("--out-dir", required=True, type=Path)


def run(args: argparse.Namespace) -> None:
    """Writes pareto.parquet and pareto.csv."""
    names = ("eval", "perf", "energy")
    tables = [read_table(args.tables, name) for name in names]
    table = pareto_table(load_study(args.study), *tables)
    sources = [args.tables / f"{name}.parquet" for name in names]
    write_table(table, args.out_dir / "pareto.parquet", sources)
    for row in table.itertuples():
        print(f"{row.model} {row.scheme}: {row.bits_per_element:.2f} bits per element")
