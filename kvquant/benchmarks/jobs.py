"""`kvquant bench jobs`: whole jobs of prompts and answers, by caches that take turns.

A case has one shape and one limit of memory. Its caches take turns in one process: its
`batch_size`, or without one as many prompts as fit, are prefilled one after the other and decoded
together. A finished case is one record, beside
which a CSV file has the samples of power, clocks and temperature. Cases of the same shape share a
model. Those whose GPUs have some kv heads each are run by as many processes
(:mod:`kvquant.benchmarks.shared_jobs`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvquant.benchmarks.job_runner import Runner, turns
from kvquant.benchmarks.job_side import JobSide
from kvquant.benchmarks.memory_budget import memory_budgets
from kvquant.benchmarks.random_model import RandomModel
from kvquant.benchmarks.shared_jobs import run_processes
from kvquant.benchmarks.team import Team
from kvquant.benchmarks.timing import synchronize
from kvquant.benchmarks.turns import finished
from kvquant.benchmarks.workload import check_devices
from kvquant.energy.estimate import EstimatedMeter
from kvquant.energy.monitor import EnergyMonitor, not_metered, open_meter
from kvquant.energy.profiler import DetailedEnergyProfiler, counter_over_power
from kvquant.errors import UserError
from kvquant.formats.files import make_folder
from kvquant.models.oom_retry import release_memory
from kvquant.runtime.progress import note
from kvquant.runtime.provenance import environment
from kvquant.study.config import Study, load_study
from kvquant.study.digests import jobs_digest
from kvquant.study.jobs import JobCase, JobsSpec
from kvquant.study.records import JobRecord, read_record, write_record


@contextmanager
def metered(
    devices: Sequence[torch.device], case: JobCase, spec: JobsSpec, team: Team
) -> Iterator[tuple[EnergyMonitor | None, DetailedEnergyProfiler | None]]:
    """Opens the meter and the profiler of a case that measures energy, in the first process."""
    processes = team.gathered(os.getpid())
    if not case.energy or not team.first:
        yield None, None
        return
    meter = open_meter(devices)
    if isinstance(meter, EstimatedMeter) and team.size > 1:
        meter.count(processes)
    own = devices if team.size == 1 else devices[:1]  # the others wait for their own GPUs
    try:
        profiler = DetailedEnergyProfiler(meter, country=spec.country)
        yield EnergyMonitor(meter, wait=lambda: synchronize(*own)), profiler
    finally:
        meter.close()


def measure(
    study: Study, name: str, model: RandomModel, device_name: str, team: Team | None = None
) -> tuple[JobRecord, DetailedEnergyProfiler | None]:
    """Measures one case; returns its record and the samples of its energy.

    Args:
        study: The study.
        name: The case.
        model: The model, or this process's part of it.
        device_name: The name of the device.
        team: The processes that share the model; only the first one's record is complete.
    """
    case, start = study.job_cases()[name], time.perf_counter()
    release_memory()
    limit: AbstractContextManager[dict[torch.device, int]]
    limit = nullcontext({model.device: model.weight_bytes})
    if model.device.type == "cuda":
        limit = memory_budgets(model.devices, case.memory_gb)
    with limit as allowed:
        return _in_memory(study, name, model, allowed, device_name, start, team or Team())


def _runner(
    study: Study, scheme: str, model: RandomModel, case: JobCase, monitor: Any, team: Team
) -> Runner:
    """Returns the runner of a case's cache, which has found what fits and has warmed up."""
    assert study.jobs is not None
    spec, alone = study.scheme(scheme), None
    note(f"jobs: {scheme}: what fits")
    side = JobSide(scheme, model.with_scheme(spec), case)
    if model.share is not None:
        side.graphs = False
        alone = JobSide(scheme, model.part_alone().with_scheme(spec), case, graphs=False)
    runner = Runner(side, study.jobs, monitor, team, alone)
    runner.prepare()
    return runner


def _in_memory(
    study: Study,
    name: str,
    model: RandomModel,
    allowed: dict[torch.device, int],
    device_name: str,
    start: float,
    team: Team,
) -> tuple[JobRecord, DetailedEnergyProfiler | None]:
    spec = study.jobs
    assert spec is not None
    case, devices = spec.cases[name], model.devices
    if team.size > 1 and model.device.type == "cuda":  # each process has the GPU of its rank
        devices = [torch.device("cuda", rank) for rank in range(team.size)]
    with metered(devices, case, spec, team) as (monitor, profiler):
        team.wait()
        idle = None if monitor is None else monitor.idle_watts(spec.idle_seconds)
        team.wait()
        runners = [_runner(study, scheme, model, case, monitor, team) for scheme in case.schemes]
        with profiler or nullcontext():
            turns(runners, case.trials, profiler)
        energy: dict[str, Any] = {}
        if monitor is not None and profiler is not None:
            energy = {
                "source": monitor.meter.source,
                "method": monitor.meter.method,
                "idle_watts": idle,
                "counter_over_power": counter_over_power(profiler.samples),
                "carbon": profiler.carbon | {"covers": "all trials of all caches"},
                "telemetry": profiler.summary() | not_metered(monitor.meter),
            }
    sides = []
    for runner in runners:
        formula = None
        if model.device.type == "cuda":
            scheme = study.scheme(runner.side.name)
            formula = model.tokens_that_fit(scheme, case.prompt, allowed)
            formula = None if formula is None else team.least(formula)
        sides.append(runner.record(formula, idle))
    record = JobRecord(
        study=study.study,
        spec_digest=jobs_digest(study, name),
        environment=environment(devices),
        device=device_name,
        case=name,
        shape=case.shape,
        prompt=case.prompt,
        answer=case.answer,
        gpus=case.num_gpus,
        split=case.split,
        memory_bytes=sum(team.gathered(sum(allowed.values()))),
        emulated=case.memory_gb is not None,
        weight_bytes=sum(team.gathered(model.weight_bytes)),
        sides=sides,
        seconds=time.perf_counter() - start,
        **energy,
    )
    return record, profiler


def show(record: JobRecord, console: Console) -> None:
    """Prints a case with one row per cache."""
    title = (
        f"{record.case} on {record.device}: {record.shape}, prompts of {record.prompt:,} and "
        f"answers of {record.answer:,} tokens"
    )
    if record.gpus > 1:
        title += f", on {record.gpus} GPUs" + (" by heads" if record.split == "heads" else "")
    if record.emulated:
        title += f" in {record.memory_bytes / 1e9:.1f} GB"
    table = Table(title=title, title_justify="left")
    heads = ("prompts", "held tokens", "prefill tok/s", "first ms", "step ms", "answer tok/s",
             "job tok/s", "J/token", "bits", "decoded by")  # fmt: skip
    table.add_column("cache")
    for head in heads:
        table.add_column(head, justify="right")
    for side in record.sides:
        held = " / ".join(
            f"{tokens:,}"
            for tokens in (side.capacity_tokens, side.context_tokens)
            if tokens is not None
        )
        if side.first_token_ms is None or side.step_ms is None:
            table.add_row(side.scheme, "out of memory", held)
            continue
        joules = side.joules_per_token
        table.add_row(
            side.scheme,
            str(side.batch_size),
            held,
            f"{side.prefill_tokens_per_s:,.0f}",
            f"{side.first_token_ms.median:,.1f}",
            f"{side.step_ms.median:,.2f}",
            f"{side.decode_tokens_per_s:,.0f}",
            f"{side.job_tokens_per_s:,.0f}",
            "" if joules is None else f"{joules:.4f}",
            f"{side.bits_per_element:.2f}",
            side.decoder,
        )
    console.print(table)


def _devices(args: argparse.Namespace, cases: dict[str, JobCase]) -> list[torch.device]:
    """Claims the devices of cases, as many as the one that needs most.

    Processes that share a model may all be on the CPU.

    Raises:
        UserError: There are fewer GPUs, other processes use them, or a single device is named for
            a case of several GPUs.
    """
    most = max(cases, key=lambda name: cases[name].num_gpus)
    count, field = cases[most].num_gpus, f"jobs.cases.{most}.gpus"
    # A GPU that this process takes for itself has less memory for those that it starts.
    taken = any(case.split == "layers" for case in cases.values())
    found = check_devices(args, count, field, current=taken)
    single = max((cases[n].num_gpus for n in cases if cases[n].split == "layers"), default=1)
    if len(found) < (count if found[0].type == "cuda" else single):
        raise UserError(
            f"{field}: {count} GPUs are asked for, but --device {args.device} is one device: give "
            "cuda, or leave the field out"
        )
    return found


def _run_case(
    study: Study,
    name: str,
    devices: Sequence[torch.device],
    model: RandomModel | None,
    args: argparse.Namespace,
) -> RandomModel | None:
    """Measures a case and writes its record; returns its model, which the next case may use.

    Args:
        study: The study.
        name: The case.
        devices: The devices of all cases.
        model: The model of the case before.
        args: The options of the verb.
    """
    case, file = study.job_cases()[name], args.out_dir / f"{name}.json"
    if case.split == "heads":
        model = None  # frees its memory for the processes
        release_memory()
        used = (list(devices) * case.num_processes)[: case.num_processes]  # the CPU serves all
        run_processes(share_of_case, (study, name, args.device_name, file), used, name)
        return None
    used = list(devices[: case.num_gpus])
    if model is None or (model.shape, model.devices) != (case.shape, used):
        model = None  # frees the memory of the last one
        model = RandomModel(case.shape, used)
    _write(file, *measure(study, name, model, args.device_name))
    return model


def _write(file: Path, record: JobRecord, profiler: DetailedEnergyProfiler | None) -> None:
    """Writes a case's record, and the samples of its energy beside it."""
    write_record(file, record)
    if profiler is not None:
        profiler.write_csv(file.with_suffix(".csv"))


def share_of_case(
    device: torch.device, team: Team, study: Study, name: str, device_name: str, file: Path
) -> None:
    """Runs the part of one of the processes that share a case's model.

    Args:
        device: The process's device.
        team: The processes.
        study: The study as the run read it, whose file may have changed since.
        name: The case.
        device_name: The name of the device.
        file: The record, which the first process writes.
    """
    model = RandomModel(study.job_cases()[name].shape, device, split="heads")
    record, profiler = measure(study, name, model, device_name, team)
    if team.first:
        _write(file, record, profiler)


def _check_folder(folder: Path) -> None:
    """Makes the folder of records, before hours of measuring and not after.

    Raises:
        UserError: It cannot be made or written.
    """
    make_folder(folder, "--out-dir")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out-dir: {folder}: cannot be written; choose another folder")


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant bench jobs` for all unfinished cases."""
    # Less memory is scattered then, so that every cache, the baseline's too, fits more prompts.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    study = load_study(args.study)
    cases = study.job_cases()
    names = list(dict.fromkeys(args.cases or cases))
    digests = {name: jobs_digest(study, name) for name in names}
    if not names:
        raise UserError("jobs: this study has no such section: add it to the study file")
    devices = _devices(args, {name: cases[name] for name in names})
    for name in names:
        case = cases[name]
        searched = case.batch_size is None or case.memory_gb is not None
        searched = searched or case.capacity or case.context
        if devices[0].type == "cpu" and searched:
            raise UserError(
                f"jobs.cases.{name}.batch_size: what fits in memory is searched on a GPU; give "
                "batch_size, without capacity, context and memory_gb"
            )
    console = Console(width=160)
    files = {name: args.out_dir / f"{name}.json" for name in names}
    there = {name: finished(files[name], JobRecord, digests[name]) for name in names}
    if None in there.values():
        _check_folder(args.out_dir)
    model: RandomModel | None = None
    for name in sorted(names, key=lambda name: list(cases).index(name)):
        record = there[name]
        if record is None:
            model = _run_case(study, name, devices, model, args)
            record = read_record(files[name], JobRecord)
        show(record, console)
