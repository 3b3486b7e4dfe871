"""`kvquant energy`: measures joules per token of whole jobs, interleaved with the baseline."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from kvquant.benchmarks.timing import synchronize
from kvquant.benchmarks.workload import Prepared, prepare
from kvquant.energy.monitor import EnergyMonitor, Meter, not_metered, open_meter
from kvquant.energy.profiler import DetailedEnergyProfiler
from kvquant.errors import UserError
from kvquant.models.oom_retry import fits_in_memory
from kvquant.runtime.provenance import environment
from kvquant.study.digests import energy_digest
from kvquant.study.records import EnergyRecord, EnergySide, write_record


@dataclass(frozen=True)
class Trial:
    """Holds joules, seconds and tokens (prompt and answer) of repeated jobs."""

    joules: float
    seconds: float
    tokens: int


def run_trial(
    job: Callable[[], object], tokens: int, monitor: EnergyMonitor, seconds: float
) -> Trial:
    """Repeats `job` at least once and for at least `seconds`.

    Counters are refreshed about every 100 ms, so a trial must be much longer. It lasts at least as
    long as the meter needs (5 s on a GPU), whatever `seconds` is.

    Args:
        job: Runs one job and waits for its device.
        tokens: Number of prompt and answer tokens of one job.
        monitor: Measures the trial.
        seconds: Shortest duration in seconds.
    """
    seconds = max(seconds, monitor.min_seconds)
    monitor.start()
    total = 0
    while True:
        job()
        total += tokens
        if monitor.elapsed >= seconds:
            reading = monitor.stop()
            return Trial(reading.joules, reading.seconds, total)


def side(name: str, trials: list[Trial], idle_watts: float) -> EnergySide:
    """Returns a side of the record, with joules and joules above idle power.

    Raises:
        UserError: The meter counted no energy in a trial.
    """
    joules = [t.joules for t in trials]
    above = [t.joules - idle_watts * t.seconds for t in trials]
    tokens = [t.tokens for t in trials]
    if not all(math.isfinite(j) and j > 0 for j in joules):
        raise UserError("energy.seconds: the meter counted no energy in this time: increase it")
    return EnergySide(
        scheme=name,
        joules=joules,
        joules_above_idle=above,
        seconds=[t.seconds for t in trials],
        tokens=tokens,
        joules_per_token=sum(joules) / sum(tokens),
        joules_per_token_above_idle=sum(above) / sum(tokens),
    )


def meter_report(meter: Meter) -> dict[str, Any]:
    """Returns the meter's report on its readings (samples, errors, gaps), if it has one."""
    report = getattr(meter, "quality", None)
    return {"meter": report()} if report else {}


def measure(prepared: Prepared, scheme_name: str, monitor: EnergyMonitor) -> dict[str, Any]:
    """Measures idle power, then both caches in turns.

    Returns:
        The measured fields of an :class:`EnergyRecord`, and the profiler under `profiler`.

    Raises:
        UserError: The workload does not fit in memory with one of the caches.
    """
    prepared.make_room()
    spec, workload = prepared.study.energy, prepared.workload
    unused = not_metered(monitor.meter)
    idle = monitor.idle_watts(spec.idle_seconds)
    sides = [(prepared.study.baseline, prepared.baseline), (scheme_name, prepared.scheme)]
    per_job = prepared.prompt_tokens + workload.batch_size * workload.answer
    trials: list[list[Trial]] = [[], []]

    def attempt(name: str, work: Callable[[], object]) -> None:
        if not fits_in_memory(work):
            raise UserError(
                f"energy.workloads: out of memory with the cache of '{name}', but energy per token "
                "needs a workload that fits under both caches: lower prompt or batch_size"
            )

    def one_trial(job: Callable[[], object], into: list[Trial]) -> None:
        into.append(run_trial(job, per_job, monitor, spec.seconds))

    for name, new_cache in sides:  # warm-up
        attempt(name, partial(prepared.job, new_cache))
    with DetailedEnergyProfiler(monitor.meter, country=spec.country) as profiler:
        for _ in range(spec.trials):
            for taken, (name, new_cache) in zip(trials, sides, strict=True):
                profiler.label = name
                attempt(name, partial(one_trial, partial(prepared.job, new_cache), taken))
    baseline, scheme = (
        side(name, taken, idle) for (name, _), taken in zip(sides, trials, strict=True)
    )
    return {
        "source": monitor.meter.source,
        "method": monitor.meter.method,
        "idle_watts": idle,
        "scheme_side": scheme,
        "baseline_side": baseline,
        "energy_ratio": scheme.joules_per_token / baseline.joules_per_token,
        "carbon": profiler.carbon | {"covers": "all trials of both caches"},
        "telemetry": profiler.summary() | meter_report(monitor.meter) | unused,
        "profiler": profiler,
    }


def show(record: EnergyRecord, console: Console) -> None:
    """Prints the record as a table."""
    table = Table(title=f"{record.workload} on {record.device} ({record.source})")
    table.add_column("cache")
    for name in ("J/token", "J/token above idle", "mean W", "trials", "seconds"):
        table.add_column(name, justify="right")
    for one in (record.baseline_side, record.scheme_side):
        table.add_row(
            one.scheme,
            f"{one.joules_per_token:.4g}",
            f"{one.joules_per_token_above_idle:.4g}",
            f"{sum(one.joules) / sum(one.seconds):.1f}",
            str(len(one.joules)),
            f"{sum(one.seconds):.1f}",
        )
    console.print(table)
    console.print(f"{record.method}; idle {record.idle_watts:.1f} W with the model loaded")
    console.print(f"energy per token over the baseline: {record.energy_ratio:.3f}")
    if "error" in record.carbon:
        console.print(f"carbon: {record.carbon['error']}")


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant energy`, which also writes all samples to a CSV file beside the record."""
    prepared = prepare(args, lambda study: study.energy.workloads)
    devices = prepared.devices
    meter = open_meter(devices)
    try:
        monitor = EnergyMonitor(meter, wait=lambda: synchronize(*devices))
        measured = measure(prepared, args.scheme, monitor)
    finally:
        meter.close()
    profiler: DetailedEnergyProfiler = measured.pop("profiler")
    record = EnergyRecord(
        study=prepared.study.study,
        spec_digest=energy_digest(prepared.study, args.model, args.scheme, args.workload),
        environment=environment(devices),
        inputs=prepared.inputs,
        device=args.device_name,
        model=args.model,
        scheme=args.scheme,
        workload=args.workload,
        rep=args.rep,
        **measured,
    )
    write_record(args.out, record)  # first, as samples need an accepted record
    profiler.write_csv(args.out.with_suffix(".csv"))
    show(record, Console(width=100))
