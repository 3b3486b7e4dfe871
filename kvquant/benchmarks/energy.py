"""`kvquant energy`: joules per token of a whole job, interleaved with the baseline."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from kvquant.benchmarks.workload import Prepared, add_common_arguments, prepare
from kvquant.energy.monitor import Meter, idle_watts, open_meter
from kvquant.energy.profiler import DetailedEnergyProfiler
from kvquant.provenance import environment
from kvquant.records import EnergyRecord, EnergySide, write_record
from kvquant.specs import energy_digest

add_arguments = add_common_arguments


def trial(
    prepared: Prepared, new_cache: Callable[[], Any], meter: Meter, seconds: float
) -> tuple[float, float, int]:
    """Repeats the job for at least `seconds`.

    Returns:
        Joules, seconds, and tokens (prompt and answer) of all repetitions.
    """
    workload = prepared.workload
    per_job = prepared.prompt_tokens + workload.batch_size * workload.answer
    start, first, tokens = time.monotonic(), meter.read(), 0
    while True:
        prepared.job(new_cache)
        tokens += per_job
        elapsed = time.monotonic() - start
        if elapsed >= seconds:
            return meter.read() - first, elapsed, tokens


def _side(name: str, trials: list[tuple[float, float, int]], idle: float) -> EnergySide:
    joules = [t[0] for t in trials]
    above = [t[0] - idle * t[1] for t in trials]
    tokens = [t[2] for t in trials]
    return EnergySide(
        scheme=name,
        joules=joules,
        joules_above_idle=above,
        seconds=[t[1] for t in trials],
        tokens=tokens,
        joules_per_token=sum(joules) / sum(tokens),
        joules_per_token_above_idle=sum(above) / sum(tokens),
    )


def _print(record: EnergyRecord) -> None:
    table = Table(title=f"{record.workload} on {record.device} ({record.source})")
    for name in ("cache", "J/token", "J/token above idle", "trials", "seconds"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for side in (record.baseline_side, record.scheme_side):
        table.add_row(
            side.scheme,
            f"{side.joules_per_token:.4f}",
            f"{side.joules_per_token_above_idle:.4f}",
            str(len(side.joules)),
            f"{sum(side.seconds):.1f}",
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"{record.method}; idle {record.idle_watts:.1f} W")
    console.print(f"energy per token over the baseline: {record.energy_ratio:.3f}")


def run(args: argparse.Namespace) -> None:
    """Measures one workload and writes its record."""
    prepared = prepare(args, lambda study: study.energy.workloads)
    spec = prepared.study.energy
    meter = open_meter(prepared.qm.device.type)
    idle = idle_watts(meter, spec.idle_seconds)
    sides: list[Callable[[], Any]] = [prepared.baseline, prepared.scheme]
    for side in sides:
        prepared.job(side)  # warm-up
    trials: list[list[tuple[float, float, int]]] = [[], []]
    with DetailedEnergyProfiler(
        meter, csv_path=args.out.with_suffix(".csv"), country=spec.country
    ) as profiler:
        for _ in range(spec.trials):
            for taken, side in zip(trials, sides, strict=True):
                taken.append(trial(prepared, side, meter, spec.seconds))
    baseline = _side(prepared.study.baseline, trials[0], idle)
    scheme = _side(args.scheme, trials[1], idle)
    record = EnergyRecord(
        study=prepared.study.study,
        spec_digest=energy_digest(prepared.study, args.model, args.scheme, args.workload),
        environment=environment(),
        device=args.device_name,
        model=args.model,
        scheme=args.scheme,
        workload=args.workload,
        rep=args.rep,
        source=meter.source,
        method=meter.method,
        idle_watts=idle,
        scheme_side=scheme,
        baseline_side=baseline,
        energy_ratio=scheme.joules_per_token / baseline.joules_per_token,
        carbon=profiler.carbon,
        telemetry=profiler.samples[-1] if profiler.samples else {},
    )
    write_record(args.out, record)
    _print(record)
