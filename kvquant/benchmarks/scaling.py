"""`kvquant bench scaling`: how much more several GPUs evaluate than one of them.

The same evaluations run on one GPU and on all visible ones, in turns. Each is a process of
`kvquant evaluate`, as the workflow starts it: it claims the least used of the GPUs that it sees.
This process starts the next one when one ends, and uses no GPU itself.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvquant.energy.gpu_use import GpuUse
from kvquant.energy.gpus import Gpu, load_nvml, short_name, visible_gpus
from kvquant.errors import UserError
from kvquant.formats.files import json_text, write_new
from kvquant.runtime.devices import used_by_others
from kvquant.runtime.progress import note
from kvquant.runtime.provenance import environment
from kvquant.study.config import Study, load_study
from kvquant.study.digests import asks_prompts, prompts_name, quantizer_digest, tables_scheme
from kvquant.study.published_quantizers import published_quantizer

CLAIMED = re.compile(r"^on GPUs? ([\d, ]+) of \d+$", re.MULTILINE)  # as processes tell it


@dataclass(frozen=True)
class Turn:
    """Holds one run of all evaluations.

    Attributes:
        gpus: Number of GPUs that the processes saw.
        seconds: Wall time.
        evaluations: Number of processes that ran.
        per_gpu: How many of these each GPU had.
        idle_share: Share of the samples in which NVML told that a GPU did nothing, by GPU.
        utilization: NVML's mean utilization in percent, by GPU.
    """

    gpus: int
    seconds: float
    evaluations: int
    per_gpu: list[int]
    idle_share: list[float | None]
    utilization: list[float | None]


def _there(file: Path) -> Path:
    """Returns a file that an evaluation reads.

    Raises:
        UserError: It is missing.
    """
    if not file.exists():
        raise UserError(f"{file}: is missing: let the workflow make it first (snakemake {file})")
    return file


def command(
    study: Study, file: Path, model: str, scheme: str, task: str, seeds: Sequence[int], device: str
) -> list[str]:
    """Returns the command of one evaluation without its `--out-dir`, as the workflow gives it.

    Args:
        study: The study, whose folders say where models, texts, prompts and quantizers are.
        file: The study's file that the process reads.
        model: Name of the model.
        scheme: Name of the scheme.
        task: Name of the task.
        seeds: The seeds to measure.
        device: Device of the process.

    Raises:
        UserError: A name is unknown, or a file is missing.
    """
    cache = Path(study.pathvars.get("cache", "resources"))
    results = Path(study.pathvars.get("results", "results/h100"))
    study.model(model)
    words = ["evaluate", "--study", file, "--model", model, "--scheme", scheme, "--task", task]
    words += ["--seeds", *seeds, "--device", device]
    words += ["--model-manifest", _there(cache / f"models/{model}/manifest.json")]
    spec = study.task(task)
    if asks_prompts(spec):
        name = prompts_name(study, model, task)
        words += ["--prompts", _there(cache / f"prompts/{model}/{task}/{name}.jsonl.gz")]
    elif (dataset := spec.dataset_name()) is not None:
        texts = results / "texts" if dataset in study.datasets else cache / "data"
        words += ["--data-manifest", _there(texts / f"{dataset}/manifest.json")]
    if study.scheme(scheme).registration.calibrated:
        digest, tables = quantizer_digest(study, model, scheme), tables_scheme(study, scheme)
        found = published_quantizer(study.published, model, tables, digest)
        built = results / f"models/{model}/{tables}/quantizer.json"
        words += ["--quantizer", found or _there(built)]
    return [sys.executable, "-m", "kvquant", *map(str, words)]


def run_all(
    commands: Sequence[Sequence[str]],
    places: int,
    folder: Path,
    environ: dict[str, str],
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Runs all commands, up to `places` at a time, and returns what each told.

    Args:
        commands: The commands; each gets a folder of its own as `--out-dir`.
        places: Number of processes at a time.
        folder: Folder for what they write.
        environ: Environment variables of the processes.
        sleep: Waits for some seconds.

    Raises:
        UserError: A process failed; the others are ended.
    """
    waiting = list(enumerate(commands))
    running: dict[int, tuple[subprocess.Popen[bytes], BufferedWriter]] = {}
    logs = [folder / f"{number}.log" for number in range(len(commands))]
    try:
        while waiting or running:
            while waiting and len(running) < places:
                number, words = waiting.pop(0)
                output = logs[number].open("wb")
                given = [*words, "--out-dir", str(folder / str(number))]
                process = subprocess.Popen(given, stdout=output, stderr=output, env=environ)
                running[number] = process, output
            for number, (process, output) in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[number]
                output.close()
                if status:
                    told = logs[number].read_text(errors="replace").strip().splitlines()
                    last = told[-1] if told else "without a word"
                    raise UserError(f"an evaluation ended with status {status}: {last}")
            sleep(0.05)
    finally:
        for process, output in running.values():
            process.kill()
            process.wait()
            output.close()
    return [file.read_text(errors="replace") for file in logs]


def per_gpu(told: Sequence[str], gpus: int) -> list[int]:
    """Returns how many processes each of `gpus` GPUs had, by what the processes told."""
    if gpus == 1:
        return [len(told)]
    found = [0] * gpus
    for text in told:
        for numbers in CLAIMED.findall(text):
            for number in numbers.split(","):
                found[int(number)] += 1
    return found


def measure(
    commands: Sequence[Sequence[str]],
    gpus: Sequence[Gpu],
    places: int,
    use: Callable[[Sequence[Gpu]], GpuUse],
) -> Turn:
    """Runs all commands on some GPUs and returns the wall time and how busy the GPUs were.

    Args:
        commands: The commands of all evaluations.
        gpus: The GPUs that the processes see.
        places: Number of processes at a time on each GPU.
        use: Samples how busy GPUs are, while it is entered.
    """
    environ = os.environ | {
        "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in gpus),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory(prefix="kvquant-scaling-") as folder, use(gpus) as sampled:
        start = time.monotonic()
        told = run_all(commands, places * len(gpus), Path(folder), environ)
        seconds = time.monotonic() - start
    return Turn(
        gpus=len(gpus),
        seconds=seconds,
        evaluations=len(commands),
        per_gpu=per_gpu(told, len(gpus)),
        idle_share=sampled.idle_share,
        utilization=sampled.utilization,
    )


def ratio(turns: Sequence[Turn]) -> float:
    """Returns the throughput of all GPUs over that of one, from the wall times of all turns."""
    most = max(turn.gpus for turn in turns)
    alone = [turn.seconds for turn in turns if turn.gpus == 1]
    together = [turn.seconds for turn in turns if turn.gpus == most]
    return (sum(alone) / len(alone)) / (sum(together) / len(together))


def show(turns: Sequence[Turn], console: Console) -> None:
    """Prints a row per turn and the ratio."""
    table = Table(title="evaluations", title_justify="left")
    for head in ("GPUs", "seconds", "evaluations/min", "per GPU", "GPU idle", "GPU busy"):
        table.add_column(head, justify="right")

    def each(values: Sequence[float | None], form: str) -> str:
        return " / ".join("-" if value is None else format(value, form) for value in values)

    for turn in turns:
        table.add_row(
            str(turn.gpus),
            f"{turn.seconds:,.1f}",
            f"{60 * turn.evaluations / turn.seconds:,.1f}",
            " / ".join(map(str, turn.per_gpu)),
            each(turn.idle_share, ".0%"),
            " / ".join("-" if u is None else f"{u:.0f} %" for u in turn.utilization),
        )
    console.print(table)
    most = max(turn.gpus for turn in turns)
    console.print(f"evaluation throughput of {most} GPUs over 1: {ratio(turns):.3f}")


def _gpus() -> tuple[Any, list[Gpu]]:
    """Returns pynvml and the visible GPUs, without starting CUDA in this process.

    Raises:
        UserError: There are fewer than two, or other processes of kvquant use them.
    """
    try:
        nvml = load_nvml()
        found = visible_gpus(nvml)
    except Exception as error:
        raise UserError(f"--device: NVML does not tell of any GPU ({error})") from None
    if len(found) < 2:
        raise UserError(
            f"--device: {len(found)} GPU(s) can be seen, and scaling needs two or more: show more "
            "(CUDA_VISIBLE_DEVICES)"
        )
    if others := used_by_others([gpu.uuid for gpu in found]):
        raise UserError(
            f"--device: {others} other process(es) of kvquant use these GPUs, which would disturb "
            "the timing: wait for them"
        )
    return nvml, found


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant bench scaling`."""
    study = load_study(args.study)
    model = args.model or next(iter(study.models))
    for option in ("processes_per_gpu", "waves", "turns"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')}: must be at least 1")
    if study.model(model).gpus > 1:
        raise UserError(f"models.{model}.gpus: scaling is of models on one GPU; set it to 1")
    if args.out.exists():  # report before minutes of measuring, not after
        raise UserError(f"--out: {args.out} exists: delete it by name to measure again")
    seeds = args.seeds or list(study.seeds)
    nvml, gpus = _gpus()
    places, names = args.processes_per_gpu, list(dict.fromkeys(short_name(g.name) for g in gpus))
    turns: list[Turn] = []

    def use(some: Sequence[Gpu]) -> GpuUse:
        return GpuUse(nvml, [gpu.handle for gpu in some])

    with tempfile.TemporaryDirectory(prefix="kvquant-scaling-") as folder:
        file = Path(folder) / "study.json"
        # What is published would be taken instead of being measured.
        unpublished = study.model_copy(update={"published": None})
        file.write_text(unpublished.model_dump_json(), encoding="utf-8")
        cells = [
            command(study, file, model, scheme, task, seeds, args.device)
            for task in args.tasks
            for scheme in args.schemes
        ]
        count = places * len(gpus) * args.waves
        commands = [cells[number % len(cells)] for number in range(count)]
        note("scaling: once, to compile kernels and read files")
        measure(cells, gpus, places, use)
        for number in range(args.turns):
            for chosen in ([gpus[number % len(gpus)]], gpus):
                note(f"scaling: {count} evaluations, {places} at a time on {len(chosen)} GPU(s)")
                turns.append(measure(commands, chosen, places, use))
    record = {
        "study": study.study,
        "model": model,
        "schemes": args.schemes,
        "tasks": args.tasks,
        "seeds": seeds,
        "devices": names,
        "processes_per_gpu": places,
        "evaluations": count,
        "turns": [asdict(turn) for turn in turns],
        "throughput_ratio": ratio(turns),
        "environment": environment(),
    }
    write_new(args.out, json_text(record))
    show(turns, Console(width=100))
