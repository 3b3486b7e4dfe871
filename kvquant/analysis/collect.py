"""`kvquant aggregate`: every configured record, verified, in tidy tables.

Nothing is dropped silently: a record that is missing, damaged, of another configuration or without
a finite value stops the collection, and all such files are named at once.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.analysis.problems import Problems
from kvquant.analysis.spec_checks import (
    check_append,
    check_energy,
    check_evaluation,
    check_kernels,
    check_throughput,
)
from kvquant.analysis.tables import read_table, write_table
from kvquant.errors import UserError, printable
from kvquant.formats.files import read_text
from kvquant.study.config import Study, load_study
from kvquant.study.digests import (
    append_digest,
    energy_digest,
    eval_digest,
    kernels_digest,
    perf_digest,
)
from kvquant.study.records import (
    AGAIN,
    AppendRecord,
    EnergyRecord,
    EnergySide,
    EvalRecord,
    KernelRecord,
    Percentiles,
    ThroughputRecord,
    absent,
)
from kvquant.study.samples import verified_samples
from kvquant.study.tasks import SUITES

__all__ = ["Problems", "collect", "read_table", "write_table"]

# Metrics of some suites that tables show beside the one that statistics use.
SUITE_METRICS = tuple(metric for suite in SUITES.values() for metric in suite.table_metrics)
MEASURE_BOTH = "delete it and run.json beside it to measure the seed again"


def _sample_score(row: dict[str, Any], suite: str) -> float:
    """A sample's score: the mean negative log likelihood of a window, else the suite's score."""
    if SUITES[suite].metric_type == "likelihood":
        return float(row["nll"] / row["tokens"])
    return float(row["score"])


def _verified(
    study: Study, file: Path, record: EvalRecord, problems: Problems
) -> list[dict[str, Any]] | None:
    """The samples of a record that is what the study asks for; None if one of them is not."""
    lines = file.with_name("samples.jsonl")
    try:
        check_evaluation(study, record)
        text = "" if absent(lines) else read_text(lines, "samples", MEASURE_BOTH)
        return verified_samples(record, text, lines, MEASURE_BOTH)
    except UserError as error:
        problems.append(str(error))
    except ValueError as error:
        problems.append(f"{file}: {printable(error)}: {AGAIN}")
    return None


def _eval_rows(
    study: Study, results: Path, problems: Problems
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, samples = [], []
    asked: dict[tuple[str, str, int], tuple[Path, str | None]] = {}
    cells = product(study.models, study.schemes, study.tasks, study.seeds)
    for model, scheme, task, seed in cells:
        if not study.evaluates(scheme, task):
            continue
        names: dict[str, Any] = {"model": model, "scheme": scheme, "task": task, "seed": seed}
        file = results / "eval" / model / scheme / task / f"seed{seed}" / "run.json"
        expected = eval_digest(study, model, scheme, task, seed)
        record = problems.read(file, EvalRecord, expected, names)
        if record is None:
            continue
        mine = (file, record.prompts_sha256)
        first, prompts = asked.setdefault((model, task, seed), mine)
        if record.prompts_sha256 != prompts:
            problems.append(
                f"{file}: answers other prompts than {first}: delete the older one and run again"
            )
            continue
        found = _verified(study, file, record, problems)
        if found is None:
            continue
        keep = ["model", "scheme", "task", "suite", "seed", "protocol", "metric"]
        keep += ["higher_is_better", "value", "samples", "tokens"]
        keep += ["cache_bytes", "cache_elements", "bits_per_element"]
        row = {name: getattr(record, name) for name in keep}
        rows.append(row | {name: record.metrics.get(name) for name in SUITE_METRICS})
        for row in found:
            samples.append(
                {
                    "model": model,
                    "scheme": scheme,
                    "task": task,
                    "suite": record.suite,
                    "seed": seed,
                    "sample": int(row["index"]),
                    "row": row.get("row"),  # of a set that seeds share
                    "start": row.get("start"),  # of a window, in the text's tokens
                    "tokens": row.get("tokens"),  # of a window that are scored
                    "score": _sample_score(row, record.suite),
                }
            )
    return rows, samples


def _side(prefix: str, side: Any) -> dict[str, Any]:
    row: dict[str, Any] = {f"{prefix}_status": side.status}
    for name in ("prefill_ms", "decode_ms", "quantize_ms"):
        times = getattr(side, name)
        for part in ("median", "p10", "p90", "p99"):
            row[f"{prefix}_{name}_{part}"] = getattr(times, part) if times else None
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes", "bits_per_element"):
        row[f"{prefix}_{name}"] = getattr(side, name)
    row[f"{prefix}_rounds"] = side.prefill_ms.n if side.prefill_ms else 0
    return row


def _trial_ratios(ours: EnergySide, base: EnergySide) -> dict[str, float | None]:
    """Lowest and highest energy ratio of two trials that followed each other."""
    sides = ([j / n for j, n in zip(s.joules, s.tokens, strict=True) if n] for s in (ours, base))
    ratios = [a / b for a, b in zip(*sides, strict=False) if b > 0]
    return {f"energy_ratio_{end}": f(ratios) if ratios else None
            for end, f in (("low", min), ("high", max))}  # fmt: skip


def _timed_rows(
    study: Study, results: Path, device: str, problems: Problems
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    perf: list[dict[str, Any]] = []
    energy: list[dict[str, Any]] = []
    keys = ["device", "model", "scheme", "workload", "rep"]
    for model in study.models:
        for scheme, workload, rep in study.throughput_cells():
            file = results / "perf" / device / model / scheme / workload / f"rep{rep}.json"
            expected = perf_digest(study, model, scheme, workload)
            names = {"device": device, "model": model, "scheme": scheme, "workload": workload}
            record = problems.read(file, ThroughputRecord, expected, names | {"rep": rep})
            if record is None or not problems.fits(file, check_throughput, study, record):
                continue
            measured = [record.scheme_side.prefill_ms, record.baseline_side.prefill_ms]
            problems.once(file, "perf", [m.model_dump() for m in measured if m is not None])
            row = {name: getattr(record, name) for name in keys}
            row |= {"prompt_tokens": record.prompt_tokens, "batch_size": record.batch_size}
            row |= {"prefill_ratio": record.prefill_ratio, "quantize_share": record.quantize_share}
            ours, base = record.scheme_side.decode_ms, record.baseline_side.decode_ms
            row["decode_ratio"] = base.median / ours.median if ours and base else None
            perf.append(
                row | _side("scheme", record.scheme_side) | _side("base", record.baseline_side)
            )
        for scheme, workload, rep in study.energy_cells():
            file = results / "energy" / device / model / scheme / workload / f"rep{rep}.json"
            expected = energy_digest(study, model, scheme, workload)
            names = {"device": device, "model": model, "scheme": scheme, "workload": workload}
            joules = problems.read(file, EnergyRecord, expected, names | {"rep": rep})
            if joules is None or not problems.fits(file, check_energy, study, joules):
                continue
            both = (joules.scheme_side, joules.baseline_side)
            problems.once(file, "energy", [[s.joules, s.seconds] for s in both])
            row = {name: getattr(joules, name) for name in keys}
            row |= {"source": joules.source, "method": joules.method}
            row |= {"idle_watts": joules.idle_watts, "energy_ratio": joules.energy_ratio}
            row |= _trial_ratios(joules.scheme_side, joules.baseline_side)
            for prefix, side in (("scheme", joules.scheme_side), ("base", joules.baseline_side)):
                row[f"{prefix}_joules_per_token"] = side.joules_per_token
                row[f"{prefix}_joules_per_token_above_idle"] = side.joules_per_token_above_idle
                row[f"{prefix}_trials"] = len(side.joules)
            energy.append(row)
    return perf, energy


def _spread(prefix: str, times: Percentiles | None) -> dict[str, Any]:
    parts = ("median", "p10", "p90", "p99", "n")
    return {f"{prefix}_{part}": getattr(times, part) if times else None for part in parts}


def _append_rows(
    study: Study, results: Path, device: str, problems: Problems
) -> list[dict[str, Any]]:
    """One row a point; none for a study that does not measure it."""
    rows: list[dict[str, Any]] = []
    for rep in range(study.append.reps if study.append else 0):
        file = results / "append" / device / f"rep{rep}.json"
        names = {"device": device, "rep": rep}
        record = problems.read(file, AppendRecord, append_digest(study), names)
        if record is None or not problems.fits(file, check_append, study, record):
            continue
        problems.once(file, "append", [p.call_ms.model_dump() for p in record.points if p.call_ms])
        shape = {name: getattr(record, name) for name in ("batch_size", "kv_heads", "head_dim")}
        for point in record.points:
            row: dict[str, Any] = {"device": record.device, "rep": rep, **shape}
            for name in ("series", "chunk", "tokens", "status", "cache_bytes"):
                row[name] = getattr(point, name)
            for name in ("token_ms", "call_ms"):
                row |= _spread(name, getattr(point, name))
            rows.append(row)
    return rows


def _kernel_rows(
    study: Study, results: Path, device: str, problems: Problems
) -> list[dict[str, Any]]:
    """One row a side; none for a study that does not measure kernels."""
    rows: list[dict[str, Any]] = []
    for case in study.kernel_cases():
        file = results / "kernels" / device / f"{case}.json"
        names = {"device": device, "case": case}
        record = problems.read(file, KernelRecord, kernels_digest(study, case), names)
        if record is None or not problems.fits(file, check_kernels, study, record):
            continue
        keys = ("device", "case", "shape", "scheme", "batch", "tokens", "all_tokens")
        same = {name: getattr(record, name) for name in keys}
        for part in record.parts:
            for side in part.sides:
                row: dict[str, Any] = {**same, "measure": part.measure}
                plain = side.model_dump(exclude={"ms", "over_ours", "reason"})
                row |= plain | _spread("ms", side.ms) | _spread("over_ours", side.over_ours)
                rows.append(row | {"copy_gb_per_s": part.copy_gb_per_s})
    return rows


def collect(
    study: Study, results: Path, device: str, problems: Problems | None = None
) -> dict[str, pd.DataFrame]:
    """Tables `eval`, `samples`, `perf`, `energy`; `append` and `kernels` where they are measured.

    Args:
        study: Says which records there are.
        results: Its folder.
        device: In the paths of what is timed.
        problems: Says whether records may be missing.

    Raises:
        UserError: One line for every record that cannot be used.
    """
    problems = Problems() if problems is None else problems
    evaluations, samples = _eval_rows(study, results, problems)
    perf, energy = _timed_rows(study, results, device, problems)
    appended = _append_rows(study, results, device, problems)
    kernels = _kernel_rows(study, results, device, problems)
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
    """Options of `kvquant aggregate`."""
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
