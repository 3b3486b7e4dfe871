"""`kvquant bench kernels`: times kernels against copies, fp16 and peers on random data and weights.

A case has one shape, and all sides of a measurement take turns in one process. A finished case is
one record. Cases of the same shape follow one another, so that its model is built once.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

from kvquant.benchmarks.kernel_measures import Bench, prompt_lengths
from kvquant.benchmarks.turns import finished
from kvquant.benchmarks.workload import check_device
from kvquant.errors import UserError
from kvquant.runtime.progress import note
from kvquant.runtime.provenance import environment
from kvquant.study.config import Study, load_study
from kvquant.study.digests import kernels_digest
from kvquant.study.kernels import ON_GPU, WHOLE_MODEL
from kvquant.study.records import KernelPart, KernelRecord, KernelSide, write_record


def order(study: Study, names: list[str]) -> list[str]:
    """Sorts cases by shape, those without a whole model first, so that models are built once."""
    cases = study.kernel_cases()
    shapes = list(dict.fromkeys(cases[name].shape for name in names))

    def place(name: str) -> tuple[int, bool]:
        case = cases[name]
        return shapes.index(case.shape), bool(set(case.measure) & set(WHOLE_MODEL))

    return sorted(names, key=place)


def measure(bench: Bench, name: str, device_name: str) -> KernelRecord:
    """Measures one case."""
    study, start = bench.study, time.perf_counter()
    case = study.kernel_cases()[name]
    parts = []
    for what in case.measure:
        note(f"kernels: {name}: {what}")
        parts.append(bench.measure(what, case))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return KernelRecord(
        study=study.study,
        spec_digest=kernels_digest(study, name),
        environment=environment([bench.device]),
        device=device_name,
        case=name,
        shape=case.shape,
        scheme=study.kernel_scheme(case),
        batch=case.batch,
        tokens=case.tokens,
        all_tokens=sum(prompt_lengths(case)),
        parts=parts,
        seconds=time.perf_counter() - start,
    )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _row(part: KernelPart, side: KernelSide) -> list[str]:
    ms, ratio = side.ms, side.over_ours
    spread = f"{ms.p10:,.3f} to {ms.p90:,.3f} ({ms.n})" if ms else ""
    return [
        part.measure,
        side.side,
        f"{ms.median:,.3f}" if ms else side.status,
        spread,
        _cell(ratio.median if ratio else None, ".2f"),
        _cell(side.gb_per_s, ",.0f"),
        _cell(side.copy_share, ".2f"),
        _cell(side.floor_ms, ",.3f"),
        _cell(side.slots_per_element, ".1f"),
        _cell(side.bits_per_element, ".2f"),
    ]


def show(record: KernelRecord, console: Console) -> None:
    """Prints a case with one row per side."""
    title = f"{record.case} on {record.device}: {record.shape}, {record.batch} x {record.tokens}"
    table = Table(title=f"{title}, {record.seconds:.0f} s", title_justify="left")
    heads = ("ms", "p10 to p90 (n)", "over ours", "GB/s", "of copy", "floor ms", "slots", "bits")
    table.add_column("measured")
    table.add_column("side")
    for head in heads:
        table.add_column(head, justify="right")
    for part in record.parts:
        for side in part.sides:
            table.add_row(*_row(part, side))
        table.add_section()
    console.print(table)


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant bench kernels` for all unfinished cases."""
    study = load_study(args.study)
    names = list(dict.fromkeys(args.cases or study.kernel_cases()))
    digests = {name: kernels_digest(study, name) for name in names}
    if not names:
        raise UserError("kernels: this study has no such section: add it to the study file")
    device = check_device(args)
    for name in names:
        case = study.kernel_cases()[name]
        scheme = study.kernel_scheme(case)
        block = getattr(study.scheme(scheme), "block_size", 1)
        beyond = [m for m in case.measure if m in ON_GPU] if device.type == "cpu" else []
        if beyond:
            raise UserError(f"kernels.cases.{name}.measure: '{beyond[0]}' needs a GPU")
        if case.tokens % block:
            raise UserError(
                f"kernels.cases.{name}.tokens: {case.tokens} is not a multiple of the block size "
                f"{block} of '{scheme}'"
            )
    bench = Bench(study, device)
    console = Console(width=140)
    there = {
        name: finished(args.out_dir / f"{name}.json", KernelRecord, digests[name]) for name in names
    }
    for name in order(study, [name for name in names if there[name] is None]):
        record = measure(bench, name, args.device_name)
        write_record(args.out_dir / f"{name}.json", record)
        there[name] = record
    for name in names:
        found = there[name]
        assert found is not None
        show(found, console)
