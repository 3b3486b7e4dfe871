"""`kvquant grid`: what a study will run, shown before it starts."""

from __future__ import annotations

import argparse

from kvquant.config import PerplexityTask, Study, load_study


def _count(number: int, noun: str) -> str:
    return f"{number or 'all'} {noun}{'' if number == 1 else 's'}"


def grid_rows(study: Study) -> list[tuple[str, int, int, str]]:
    """(stage, jobs, results, what) of every measured stage."""
    models, schemes, seeds = len(study.models), len(study.schemes), len(study.seeds)
    rows = []
    for name, task in study.tasks.items():
        if isinstance(task, PerplexityTask):
            what = f"{_count(task.windows, 'window')} of {task.window} tokens, protocol "
            what += task.protocol
        else:
            what = f"{_count(task.samples, 'sample')} of {task.length} tokens"
        jobs = models * schemes
        rows.append((f"evaluate {name}", jobs, jobs * seeds, f"{what}, {_count(seeds, 'seed')}"))
    for stage, cells, spec in (
        ("throughput", study.throughput_cells(), study.throughput),
        ("energy", study.energy_cells(), study.energy),
    ):
        workloads = ", ".join(spec.workloads) or "none"
        rows.append((stage, models * len(cells), models * len(cells), workloads))
    return rows


def expected_gpu_hours(study: Study) -> float:
    """GPU-hours of all evaluations, from the tasks' expected minutes; 0 for a CPU study."""
    if not study.gpus:
        return 0.0
    minutes = sum(t.minutes for t in study.tasks.values()) * len(study.seeds) * len(study.schemes)
    return sum(minutes * m.gpus for m in study.models.values()) / 60


def grid_lines(study: Study) -> list[str]:
    """The grid as plain lines."""
    lines = [
        f"Study '{study.study}': {len(study.models)} model(s) {', '.join(study.models)}; "
        f"{len(study.schemes)} schemes {', '.join(study.schemes)}"
    ]
    for stage, jobs, results, what in grid_rows(study):
        lines.append(f"  {stage:<32} {jobs:>5} jobs {results:>6} results  {what}")
    hours = expected_gpu_hours(study)
    if hours:
        lines.append(f"  evaluation is expected to take {hours:,.0f} GPU-hours at most")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant grid`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")


def run(args: argparse.Namespace) -> None:
    """Prints the grid as a table."""
    # Here and not above: the Snakefile imports this module for `grid_lines`.
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
    if hours := expected_gpu_hours(study):
        console.print(f"evaluation is expected to take {hours:,.0f} GPU-hours at most")
