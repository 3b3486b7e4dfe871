"""`kvquant bench jobs`: whole jobs of prompts and answers, by caches that take turns.

A case has one shape and one limit of memory. Its caches take turns in one process: its
`batch_size`, or without one as many prompts as fit, are prefilled one after the other and decoded
together. A finished case is one record, beside
which a CSV file has the samples of power, clocks and temperature. Cases of the same shape share a
model.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvquant.benchmarks.job_side import JobSide, JobTimes
from kvquant.benchmarks.memory_budget import memory_budgets
from kvquant.benchmarks.random_model import RandomModel
from kvquant.benchmarks.timing import summarize, synchronize
from kvquant.benchmarks.turns import finished
from kvquant.benchmarks.workload import check_devices
from kvquant.energy.monitor import EnergyMonitor, not_metered, open_meter
from kvquant.energy.profiler import DetailedEnergyProfiler, counter_over_power
from kvquant.errors import UserError
from kvquant.models.oom_retry import fits_in_memory, release_memory
from kvquant.runtime.progress import note
from kvquant.runtime.provenance import environment
from kvquant.study.config import Study, load_study
from kvquant.study.digests import jobs_digest
from kvquant.study.jobs import JobCase, JobsSpec
from kvquant.study.records import JobRecord, JobTrial, write_record
from kvquant.study.records import JobSide as SideRecord


class Runner:
    """Runs the trials of one cache and keeps what they measured.

    Args:
        side: The cache's side.
        spec: The study's section `jobs`.
        monitor: Measures energy; None measures times alone.
    """

    def __init__(self, side: JobSide, spec: JobsSpec, monitor: EnergyMonitor | None) -> None:
        self.side, self._spec, self._monitor = side, spec, monitor
        self.batch = 0
        self.slow = False
        self.capacity: int | None = None
        self.context: int | None = None
        self.trials: list[JobTrial] = []
        self.times: list[JobTimes] = []

    def prepare(self) -> None:
        """Finds the batch and runs a job to warm up."""
        case = self.side.case
        self.batch = case.batch_size or 0
        if case.context:
            self.context = self.side.longest_context()
        if case.capacity or not self.batch:
            fitting, self.capacity = self.side.tokens_that_fit()
            self.batch = self.batch or fitting
        given = case.batch_size is not None
        self.batch, seconds = self.side.largest_batch(self.batch, fewer=not given)
        self.slow = seconds > self._spec.slow_seconds

    def _job(self) -> tuple[JobTimes, tuple[float, float] | None]:
        """Runs one job; returns its times and the joules of prompts and answers."""
        monitor = self._monitor
        release_memory()  # before energy is counted, which belongs to no job
        if monitor is None:
            return self.side.job(self.batch), None
        joules: list[float] = []

        def between() -> None:
            joules.append(monitor.stop().joules)
            monitor.start()

        monitor.start()
        times = self.side.job(self.batch, between)
        return times, (joules[0], monitor.stop().joules)

    def trial(self) -> None:
        """Runs one trial: a job, or as many as the meter needs."""
        shortest = 0.0
        if self._monitor is not None:
            shortest = max(self._spec.seconds, self._monitor.min_seconds)
        jobs, prefill, decode, joules = 0, 0.0, 0.0, [0.0, 0.0]
        while not jobs or prefill + decode < shortest:
            times, used = self._job()
            self.times.append(times)
            jobs += 1
            prefill += times.prefill_seconds
            decode += times.decode_seconds
            joules = [a + b for a, b in zip(joules, used or (0.0, 0.0), strict=True)]
        measured = self._monitor is not None
        self.trials.append(
            JobTrial(
                jobs=jobs,
                prefill_seconds=prefill,
                decode_seconds=decode,
                prefill_joules=joules[0] if measured else None,
                decode_joules=joules[1] if measured else None,
            )
        )

    def lower(self) -> None:
        """Goes on with a smaller batch, as the last one no longer fits."""
        self.batch -= 1
        if self.side.case.batch_size is not None:
            self.batch = 0
        self.trials.clear()
        self.times.clear()

    def record(self, formula: int | None, idle_watts: float | None) -> SideRecord:
        """Returns the measurements as a side of the record."""
        side, case = self.side, self.side.case
        if not self.trials:
            return SideRecord(
                scheme=side.name,
                status="oom",
                capacity_tokens=self.capacity,
                context_tokens=self.context,
                formula_tokens=formula,
            )
        jobs = sum(trial.jobs for trial in self.trials)
        prompts, answers = (jobs * self.batch * n for n in (case.prompt, case.answer))
        prefill = sum(trial.prefill_seconds for trial in self.trials)
        decode = sum(trial.decode_seconds for trial in self.trials)
        energy: dict[str, float] = {}
        if idle_watts is not None:
            first = sum(t.prefill_joules or 0.0 for t in self.trials)
            second = sum(t.decode_joules or 0.0 for t in self.trials)
            above = first + second - idle_watts * (prefill + decode)
            energy = {
                "joules_per_prompt_token": first / prompts,
                "joules_per_answer_token": second / answers,
                "joules_per_token": (first + second) / (prompts + answers),
                "joules_per_token_above_idle": above / (prompts + answers),
            }
        last = self.times[-1]
        return SideRecord(
            scheme=side.name,
            status="ok",
            decoder=last.decoder,
            batch_size=self.batch,
            capacity_tokens=self.capacity,
            context_tokens=self.context,
            formula_tokens=formula,
            trials=self.trials,
            first_token_ms=summarize([ms for times in self.times for ms in times.first_token_ms]),
            step_ms=summarize([ms for times in self.times for ms in times.step_ms]),
            prefill_tokens_per_s=prompts / prefill,
            decode_tokens_per_s=answers / decode,
            job_tokens_per_s=(prompts + answers) / (prefill + decode),
            peak_bytes=max(times.peak for times in self.times) or None,
            steady_bytes=last.steady or None,
            cache_bytes=last.cache_bytes,
            cache_elements=last.elements,
            bits_per_element=8 * last.cache_bytes / last.elements,
            **energy,
        )


@contextmanager
def metered(
    devices: Sequence[torch.device], case: JobCase, spec: JobsSpec
) -> Iterator[tuple[EnergyMonitor | None, DetailedEnergyProfiler | None]]:
    """Opens the meter and the profiler of a case that measures energy."""
    if not case.energy:
        yield None, None
        return
    meter = open_meter(devices)
    try:
        profiler = DetailedEnergyProfiler(meter, country=spec.country)
        yield EnergyMonitor(meter, wait=lambda: synchronize(*devices)), profiler
    finally:
        meter.close()


def turns(runners: list[Runner], trials: int, profiler: DetailedEnergyProfiler | None) -> None:
    """Lets the caches run their trials in turns; a slow one runs the first alone.

    A batch that fitted before and no longer does, because free memory is scattered, is lowered, and
    the cache's trials begin anew.
    """
    for number in range(trials):
        for runner in runners:
            if runner.slow and number:
                continue
            while runner.batch and len(runner.trials) <= number:
                if profiler is not None:
                    profiler.label = runner.side.name
                done = f"trial {len(runner.trials) + 1}, {runner.batch} prompts"
                note(f"jobs: {runner.side.name}: {done}")
                if not fits_in_memory(runner.trial):
                    runner.lower()


def measure(
    study: Study, name: str, model: RandomModel, device_name: str
) -> tuple[JobRecord, DetailedEnergyProfiler | None]:
    """Measures one case; returns its record and the samples of its energy."""
    case, start = study.job_cases()[name], time.perf_counter()
    release_memory()
    limit: AbstractContextManager[dict[torch.device, int]]
    limit = nullcontext({model.device: model.weight_bytes})
    if model.device.type == "cuda":
        limit = memory_budgets(model.devices, case.memory_gb)
    with limit as allowed:
        return _in_memory(study, name, model, allowed, device_name, start)


def _in_memory(
    study: Study,
    name: str,
    model: RandomModel,
    allowed: dict[torch.device, int],
    device_name: str,
    start: float,
) -> tuple[JobRecord, DetailedEnergyProfiler | None]:
    spec = study.jobs
    assert spec is not None
    case = spec.cases[name]
    with metered(model.devices, case, spec) as (monitor, profiler):
        idle = None if monitor is None else monitor.idle_watts(spec.idle_seconds)
        runners = []
        for scheme in case.schemes:
            side = JobSide(scheme, model.with_scheme(study.scheme(scheme)), case)
            note(f"jobs: {scheme}: what fits")
            runners.append(Runner(side, spec, monitor))
            runners[-1].prepare()
        if profiler is None:
            turns(runners, case.trials, None)
        else:
            with profiler:
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
            formula = model.tokens_that_fit(study.scheme(runner.side.name), case.prompt, allowed)
        sides.append(runner.record(formula, idle))
    record = JobRecord(
        study=study.study,
        spec_digest=jobs_digest(study, name),
        environment=environment(model.devices),
        device=device_name,
        case=name,
        shape=case.shape,
        prompt=case.prompt,
        answer=case.answer,
        gpus=case.num_gpus,
        memory_bytes=sum(allowed.values()),
        emulated=case.memory_gb is not None,
        weight_bytes=model.weight_bytes,
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
        title += f", on {record.gpus} GPUs"
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

    Raises:
        UserError: There are fewer GPUs, other processes use them, or a single device is named for
            a case of several GPUs.
    """
    most = max(cases, key=lambda name: cases[name].num_gpus)
    count, field = cases[most].num_gpus, f"jobs.cases.{most}.gpus"
    found = check_devices(args, count, field)
    if len(found) < count:
        raise UserError(
            f"{field}: {count} GPUs are asked for, but --device {args.device} is one device: give "
            "cuda, or leave the field out"
        )
    return found


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
    device = devices[0]
    for name in names:
        case = cases[name]
        searched = case.batch_size is None or case.memory_gb is not None
        searched = searched or case.capacity or case.context
        if device.type == "cpu" and searched:
            raise UserError(
                f"jobs.cases.{name}.batch_size: what fits in memory is searched on a GPU; give "
                "batch_size, without capacity, context and memory_gb"
            )
    console = Console(width=160)
    files = {name: args.out_dir / f"{name}.json" for name in names}
    there = {name: finished(files[name], JobRecord, digests[name]) for name in names}
    model: RandomModel | None = None
    for name in sorted(names, key=lambda name: list(cases).index(name)):
        record = there[name]
        if record is None:
            used = devices[: cases[name].num_gpus]
            if model is None or (model.shape, model.devices) != (cases[name].shape, used):
                model = None  # frees the memory of the last one
                model = RandomModel(cases[name].shape, used)
            record, profiler = measure(study, name, model, args.device_name)
            write_record(files[name], record)
            if profiler is not None:
                profiler.write_csv(files[name].with_suffix(".csv"))
        show(record, console)
