"""`kvquant pareto`: puts accuracy, bits, speed and energy of every scheme side by side."""

from __future__ import annotations

import argparse

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


def first_task(study: Study, evaluations: pd.DataFrame, *suites: str) -> str | None:
    """Returns the task that stands for suites: the study's first that anything was evaluated on.

    Sizes and likelihoods of different tasks are not comparable, and schemes run different tasks.
    """
    there = set(evaluations[evaluations.suite.isin(suites)].task)
    return next((name for name in study.tasks if name in there), None)


def bits_of(rows: pd.DataFrame) -> float:
    """Returns the bits per element of results together; NaN of none."""
    return float(8 * rows.cache_bytes.sum() / rows.cache_elements.sum()) if len(rows) else np.nan


def _standing_for(study: Study, evaluations: pd.DataFrame, suite: str) -> list[str]:
    """Returns the tasks of which a suite's value is the mean; one that scores needs all of them."""
    if suite in likelihood_suites():
        first = first_task(study, evaluations, suite)
        return [] if first is None else [first]
    return [str(task) for task in evaluations[evaluations.suite == suite].task.unique()]


def _accuracy(
    study: Study, evaluations: pd.DataFrame, mine: pd.DataFrame, base: pd.DataFrame
) -> dict[str, object]:
    """Returns the suites, the divergence and the bits of one scheme, and the task of the latter.

    Args:
        study: The study.
        evaluations: All results, which say what tasks there are.
        mine: Those of the scheme on one model.
        base: Those of the baseline on that model.
    """
    row: dict[str, object] = {}
    for suite in SUITES:
        tasks = _standing_for(study, evaluations, suite)
        values, reference = (
            side[side.suite == suite].groupby("task")["value"].mean().reindex(tasks)
            for side in (mine, base)
        )
        # a mean over other tasks than another scheme's is no worse or better than that
        row[suite] = values.mean(skipna=False) if tasks else np.nan
        row[f"{suite}_change"] = (values - reference).mean(skipna=False) if tasks else np.nan
    language = first_task(study, evaluations, *likelihood_suites())
    sized = first_task(study, evaluations, *SUITES) if language is None else language
    row["quality_task"] = sized or ""
    row["kl"] = mine[mine.task == language]["kl"].mean() if "kl" in mine else np.nan
    row["bits_per_element"] = bits_of(mine[mine.task == sized])
    return row


def pareto_table(
    study: Study, evaluations: pd.DataFrame, perf: pd.DataFrame, energy: pd.DataFrame
) -> pd.DataFrame:
    """Returns a row per (model, scheme).

    Every column compares schemes on the same tasks. Perplexity, `kl` and `bits_per_element` are
    those of the first perplexity task (bits: without one, of the first task of all), which
    `quality_task` names. Other suites are means over all their tasks. NaN stands for a scheme that
    lacks one of these tasks. `kl` does not count for dominance, as perplexity shows that damage;
    `dominated` is missing for a scheme without bits, which any 16-bit cache would beat.

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
            row |= _accuracy(study, evaluations, mine, base)
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
            row["prefill_workload"] = (timed_on and prefill) or ""
            row["energy_workload"] = (metered_on and energy_of) or ""
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
    table["dominated"] = table["dominated"].astype("boolean").mask(table.bits_per_element.isna())
    return table


def run(args: argparse.Namespace) -> None:
    """Writes pareto.parquet and pareto.csv."""
    names = ("eval", "perf", "energy")
    tables = [read_table(args.tables, name) for name in names]
    table = pareto_table(load_study(args.study), *tables)
    sources = [args.tables / f"{name}.parquet" for name in names]
    write_table(table, args.out_dir / "pareto.parquet", sources)
    for row in table.itertuples():
        print(f"{row.model} {row.scheme}: {row.bits_per_element:.2f} bits per element")
