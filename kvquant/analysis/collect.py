"""`kvquant aggregate`: every configured record, verified, in tidy tables.

Nothing is dropped silently: a record that is missing, damaged, of another configuration or without
a finite value stops the collection, and all such files are named at once.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from pydantic import BaseModel

from kvquant.config import Study, load_study
from kvquant.errors import UserError
from kvquant.files import sha256_text
from kvquant.records import (
    AppendRecord,
    EnergyRecord,
    EvalRecord,
    KernelRecord,
    Percentiles,
    ThroughputRecord,
    read_record,
)
from kvquant.specs import (
    append_digest,
    energy_digest,
    eval_digest,
    kernels_digest,
    perf_digest,
)

R = TypeVar("R", bound=BaseModel)

FLOAT_FORMAT = "%.10g"
# Metrics of some suites that tables show beside the one that statistics use.
SUITE_METRICS = ("kl", "rows_available", "rows_official")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Writes `path` (.parquet) and its CSV twin, both atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    twin = path.with_suffix(".csv")
    temporary = path.with_suffix(".tmp")
    table.to_parquet(temporary, index=False)
    temporary.replace(path)
    table.to_csv(temporary, index=False, float_format=FLOAT_FORMAT)
    temporary.replace(twin)


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """A collected table.

    Raises:
        UserError: It does not exist.
    """
    file = folder / f"{name}.parquet"
    if not file.is_file():
        raise UserError(f"--tables: no {name}.parquet in {folder}: run `aggregate` first")
    return pd.read_parquet(file)


def _stale(file: Path, found: str, expected: str) -> str:
    return (
        f"{file}: measured with another configuration (digest {found}, the study has {expected}): "
        "delete it by name and run again, or rename the changed entry"
    )


class Problems(list[str]):
    """What is wrong with the records, for one message.

    Args:
        present: Records that are not there yet are no problem: the study is unfinished.
    """

    def __init__(self, present: bool = False) -> None:
        super().__init__()
        self.present, self.missing = present, 0

    def read(self, file: Path, kind: type[R], digest: str) -> R | None:
        """A record of the specification with that digest; None where there is none to use."""
        if self.present and not file.is_file():
            self.missing += 1
            return None
        try:
            record = read_record(file, kind)
        except UserError as error:
            self.append(str(error))
            return None
        found: str = record.spec_digest  # type: ignore[attr-defined]
        if found != digest:
            self.append(_stale(file, found, digest))
            return None
        return record


def _sample_score(row: dict[str, Any], suite: str) -> float:
    """A sample's score: mean negative log likelihood for perplexity, else the suite's score."""
    return row["nll"] / row["tokens"] if suite == "perplexity" else float(row["score"])


def _eval_rows(
    study: Study, results: Path, problems: Problems
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, samples = [], []
    asked: dict[tuple[str, str, int], tuple[Path, str | None]] = {}
    for model in study.models:
        for scheme in study.schemes:
            for task in (t for t in study.tasks if study.evaluates(scheme, t)):
                for seed in study.seeds:
                    folder = results / "eval" / model / scheme / task / f"seed{seed}"
                    file = folder / "run.json"
                    expected = eval_digest(study, model, scheme, task, seed)
                    record = problems.read(file, EvalRecord, expected)
                    if record is None:
                        continue
                    mine = (file, record.prompts_sha256)
                    first, prompts = asked.setdefault((model, task, seed), mine)
                    if record.prompts_sha256 != prompts:
                        problems.append(
                            f"{file}: answers other prompts than {first}: delete the older one and "
                            "run again"
                        )
                        continue
                    if not math.isfinite(record.value):
                        problems.append(f"{file}: field 'value' is {record.value}")
                        continue
                    keep = ["model", "scheme", "task", "suite", "seed", "protocol", "metric"]
                    keep += ["higher_is_better", "value", "samples", "tokens"]
                    keep += ["cache_bytes", "cache_elements", "bits_per_element"]
                    row = {name: getattr(record, name) for name in keep}
                    rows.append(row | {name: record.metrics.get(name) for name in SUITE_METRICS})
                    lines = folder / "samples.jsonl"
                    text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
                    if sha256_text(text) != record.samples_sha256:
                        problems.append(
                            f"{lines}: not the samples of run.json: delete both and run again"
                        )
                        continue
                    # not splitlines(), which also cuts at U+2028 inside an answer
                    for line in filter(None, text.split("\n")):
                        row = json.loads(line)
                        samples.append(
                            {
                                "model": model,
                                "scheme": scheme,
                                "task": task,
                                "suite": record.suite,
                                "seed": seed,
                                "sample": int(row["index"]),
                                "row": row.get("row"),  # of a set that seeds share
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
            record = problems.read(file, ThroughputRecord, expected)
            if record is None:
                continue
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
            joules = problems.read(file, EnergyRecord, expected)
            if joules is None:
                continue
            row = {name: getattr(joules, name) for name in keys}
            row |= {"source": joules.source, "method": joules.method}
            row |= {"idle_watts": joules.idle_watts, "energy_ratio": joules.energy_ratio}
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
        record = problems.read(file, AppendRecord, append_digest(study))
        if record is None:
            continue
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
        record = problems.read(file, KernelRecord, kernels_digest(study, case))
        if record is None:
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
        "samples": pd.DataFrame(samples).astype({"row": "Int64"} if samples else {}),
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
