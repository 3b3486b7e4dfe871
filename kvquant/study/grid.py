"""`kvquant grid`: shows the jobs of a study and their resources before it starts."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from kvquant.study.config import Study, load_study
from kvquant.study.digests import asks_prompts
from kvquant.study.suite import count_of

CPUS_PER_GPU = 16  # a GPU's share of a node with 128 cores and 8 GPUs
CALIBRATION_MINUTES = 120
PREPARE_MINUTES = 60  # to prepare prompts, or to build a quantizer from statistics
PREPARE_MEM_MB = 4_000
TIMED_MINUTES = 30  # beside the timed rounds of a job: loading, warm-up, a slow disk
BENCH_MEM_MB = 16_000  # torch, and on a CPU one layer of the append benchmark at its largest size
LOAD_MINUTES = 3  # per process: imports, weights from a shared file system, first kernels


@dataclass(frozen=True)
class Request:
    """Holds the resources that one job requests from a scheduler."""

    gpus: int
    mem_mb: int
    minutes: int


def request(
    study: Study,
    rule: str,
    model: str | None,
    task: str | None = None,
    attempt: int = 1,
    case: str | None = None,
) -> Request:
    """Returns the resources of a job of `rule`, whose time and memory grow with each attempt.

    A timed job of a study that takes several GPUs for one requests their whole share of the node's
    memory. Its memory does not grow, because a job that exceeds the node would wait for ever.

    Args:
        study: The study.
        rule: A measuring rule.
        model: The job's model, if it has one.
        task: The task of an evaluation; None: all tasks.
        attempt: The number of the attempt, from 1.
        case: The case of whole jobs; None for other rules.
    """
    if rule in ("prompts", "quantize"):
        mem = PREPARE_MEM_MB
        if rule == "quantize" and model is not None and study.sampled_tokens():
            mem = max(mem, study.model(model).mem_gb * 1000)  # statistics hold whole tokens
        return Request(0, mem * attempt, PREPARE_MINUTES * attempt)
    if rule == "append_cost":
        assert study.append is not None
        return Request(study.gpus, BENCH_MEM_MB * attempt, study.append.minutes * attempt)
    if rule == "kernel_case":
        assert study.kernels is not None
        return Request(study.gpus, BENCH_MEM_MB * attempt, study.kernels.minutes * attempt)
    if rule == "job_case":
        assert study.jobs is not None and case is not None
        job = study.jobs.cases[case]
        gpus = max(study.gpus, job.num_gpus) if study.gpus else 0
        # Each process of a case imports torch; those of a whole node could not ask for more.
        mem = BENCH_MEM_MB * (attempt if job.num_processes == 1 else job.num_processes)
        return Request(gpus, mem, study.jobs.minutes * attempt)
    assert model is not None
    spec = study.model(model)
    mem = spec.mem_gb * 1000
    if rule in ("throughput", "energy"):
        minutes = TIMED_MINUTES + math.ceil(_timed_seconds(study, rule) / 60)
        gpus = max(study.gpus, spec.gpus) if study.gpus else 0
        if study.gpus > 1:
            return Request(gpus, mem * gpus, minutes * attempt)
        return Request(gpus, mem * attempt, minutes * attempt)
    gpus = spec.gpus if study.gpus else 0
    if rule == "calibrate":
        return Request(gpus, mem * attempt, CALIBRATION_MINUTES * attempt)
    tasks = study.tasks if task is None else [task]  # a job without a task evaluates all
    minutes = sum(study.task(name).minutes for name in tasks) * len(study.seeds)
    return Request(gpus, mem * attempt, minutes * attempt)


def threads(study: Study, rule: str, cores: int) -> int:
    """Returns the CPU threads that a job of `rule` uses.

    Args:
        study: The study.
        rule: A measuring rule.
        cores: Cores of the machine that a CPU study runs on.
    """
    if rule == "calibrate":
        # On a CPU other cores evaluate what needs no calibration, which keeps them busier.
        return 8 if study.gpus else 1
    if rule == "evaluate":
        return 4 if study.gpus else 1
    if rule in ("prompts", "quantize"):
        return 1
    # Timed jobs have their machine, or their GPUs' share of it, to themselves.
    return CPUS_PER_GPU * study.gpus if study.gpus else cores


def place_in_line(study: Study, model: str, scheme: str, task: str | None = None) -> int:
    """Returns an evaluation's place in the order of jobs: by task, then model, then scheme.

    An interrupted run has then finished the first tasks for every scheme, which can be compared. A
    job without a task evaluates all of them.
    """
    place = 0 if task is None else list(study.tasks).index(task)
    place = place * len(study.models) + list(study.models).index(model)
    return place * len(study.schemes) + list(study.schemes).index(scheme)


def eval_jobs(study: Study) -> list[tuple[str, str | None]]:
    """Returns (scheme, task) of every evaluation job per model; no task is named for all tasks."""
    if study.evaluation.tasks_per_job == "all":
        return [(scheme, None) for scheme in dict.fromkeys(s for s, _ in study.eval_cells())]
    return [*study.eval_cells()]


def _timed_seconds(study: Study, rule: str) -> float:
    """Returns an upper bound in seconds of a job's timed part, for scheme and baseline."""
    if rule == "throughput":
        return 2 * study.throughput.max_seconds
    spec = study.energy
    return spec.idle_seconds + 2 * 2 * spec.trials * spec.seconds


def grid_rows(study: Study) -> list[tuple[str, int, int, str]]:
    """Returns (stage, jobs, results, description) of every measured stage."""
    models, seeds = len(study.models), len(study.seeds)
    rows = []
    for name, task in study.tasks.items():
        cells = models * sum(study.evaluates(scheme, name) for scheme in study.schemes)
        # Jobs of several tasks are counted with the first one.
        shared = study.evaluation.tasks_per_job == "all" and name != next(iter(study.tasks))
        what = f"{task.describe()}, {count_of(seeds, 'seed')}"
        what += ", in the same jobs" if shared else ""
        rows.append((f"evaluate {name}", 0 if shared else cells, cells * seeds, what))
    for stage, timed, spec in (
        ("throughput", study.throughput_cells(), study.throughput),
        ("energy", study.energy_cells(), study.energy),
    ):
        workloads = ", ".join(spec.workloads) or "none"
        rows.append((stage, models * len(timed), models * len(timed), workloads))
    if study.append is not None:
        first, last = study.append.sizes[0], study.append.sizes[-1]
        what = f"{len(study.append.sizes)} sizes from {first} to {last} tokens"
        rows.append(("append", study.append.reps, study.append.reps, what))
    if cases := study.kernel_cases():
        rows.append(("kernels", len(cases), len(cases), ", ".join(cases)))
    if whole := study.job_cases():
        rows.append(("jobs", len(whole), len(whole), ", ".join(whole)))
    return rows


def job_rows(study: Study) -> list[tuple[str, int, float]]:
    """Returns (rule, jobs, GPU-hours that first attempts request) of every measuring rule."""
    rows = []
    built = sum(s.registration.calibrated for s in study.schemes.values())

    def hours(rule: str, jobs: int, task: str | None = None) -> float:
        asked = (request(study, rule, model, task) for model in study.models)
        return jobs * sum(r.gpus * r.minutes for r in asked) / 60

    models = len(study.models)
    if built:
        calibrations = len(study.used_calibrations())
        rows.append(("calibrate", models * calibrations, hours("calibrate", calibrations)))
        rows.append(("quantize", models * built, 0.0))
    if asking := sum(map(asks_prompts, study.tasks.values())):
        rows.append(("prompts", models * asking, 0.0))
    evaluations = eval_jobs(study)
    evaluation = sum(hours("evaluate", 1, task) for _, task in evaluations)
    rows.append(("evaluate", models * len(evaluations), evaluation))
    for rule, timed in (
        ("throughput", study.throughput_cells()),
        ("energy", study.energy_cells()),
    ):
        rows.append((rule, models * len(timed), hours(rule, len(timed))))
    if study.append is not None:
        asked, reps = request(study, "append_cost", None), study.append.reps
        rows.append(("append_cost", reps, reps * asked.gpus * asked.minutes / 60))
    if study.kernels is not None:
        asked = request(study, "kernel_case", None)
        cases = len(study.kernels.cases)
        rows.append(("kernel_case", cases, cases * asked.gpus * asked.minutes / 60))
    if study.jobs is not None:
        each = [request(study, "job_case", None, case=name) for name in study.jobs.cases]
        rows.append(("job_case", len(each), sum(r.gpus * r.minutes for r in each) / 60))
    return rows


def expected_gpu_hours(study: Study) -> float:
    """Returns the GPU-hours that the first attempts of all jobs request; 0 for a CPU study."""
    return sum(hours for _, _, hours in job_rows(study))


def one_job_per_seed(study: Study) -> tuple[int, float]:
    """Returns (jobs, GPU-hours) if each seed were a job of its own that loaded its model."""
    rows = job_rows(study)
    evaluations = next(jobs for rule, jobs, _ in rows if rule == "evaluate")
    more = evaluations * (len(study.seeds) - 1)
    loading = sum(
        request(study, "evaluate", m, t).gpus * (len(study.seeds) - 1)
        for m in study.models
        for _, t in eval_jobs(study)
    )
    jobs = sum(jobs for _, jobs, _ in rows)
    return jobs + more, expected_gpu_hours(study) + loading * LOAD_MINUTES / 60


def summary_lines(study: Study) -> list[str]:
    """Returns lines with jobs and GPU-hours by rule, also for the case of one job per seed."""
    rows = job_rows(study)
    total = sum(jobs for _, jobs, _ in rows)
    lines = [f"  {'rule':<32} {'jobs':>5}      GPU-hours requested"]
    for rule, jobs, hours in [*rows, ("all", total, expected_gpu_hours(study))]:
        lines.append(f"  {rule:<32} {jobs:>5,}      {hours:>9,.1f}")
    jobs, hours = one_job_per_seed(study)
    lines.append(
        f"  with one job per seed: {jobs:,} jobs, {hours:,.1f} GPU-hours "
        f"({LOAD_MINUTES} minutes per job to load the model)"
    )
    return lines


def grid_lines(study: Study) -> list[str]:
    """Returns the grid as plain lines."""
    lines = [
        f"Study '{study.study}': {len(study.models)} model(s) {', '.join(study.models)}; "
        f"{len(study.schemes)} schemes {', '.join(study.schemes)}"
    ]
    for stage, jobs, results, what in grid_rows(study):
        lines.append(f"  {stage:<32} {jobs:>5} jobs {results:>6} results  {what}")
    return lines + (summary_lines(study) if study.gpus else [])


def run(args: argparse.Namespace) -> None:
    """Prints the grid as a table."""
    # Not at the top: the Snakefile imports this module for `grid_lines`.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    study = load_study(args.study)
    table = Table(box=box.SIMPLE, title=f"Study '{study.study}'", title_justify="left")
    for heading in ("stage", "jobs", "results", "what"):
        table.add_column(heading, justify="right" if heading in ("jobs", "results") else "left")
    rows = grid_rows(study)
    for stage, jobs, results, what in rows:
        table.add_row(stage, f"{jobs:,}", f"{results:,}", what)
    table.add_section()
    table.add_row("all", f"{sum(r[1] for r in rows):,}", f"{sum(r[2] for r in rows):,}", "")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"models:  {', '.join(study.models)}")
    console.print(f"schemes: {', '.join(study.schemes)}")
    console.print(f"seeds:   {', '.join(map(str, study.seeds))}")
    for line in summary_lines(study) if study.gpus else []:
        print(line)
