"""`kvquant seal`: gives records of before there were seals theirs, once, without measuring again.

A record of schema version 1 had no seal. Everything in it that can be recomputed is recomputed
first, also from its samples; a folder with one record that does not hold is left as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, printable
from kvquant.formats.files import parse_json, read_json, read_text, replace
from kvquant.study.record_types import (
    AppendRecord,
    EnergyRecord,
    EvalRecord,
    KernelRecord,
    Record,
    ThroughputRecord,
)
from kvquant.study.records import AGAIN, parse_record, read_record, record_text
from kvquant.study.samples import verified_samples

KINDS: dict[str, type[Record]] = {
    "eval": EvalRecord,
    "throughput": ThroughputRecord,
    "energy": EnergyRecord,
    "append": AppendRecord,
    "kernels": KernelRecord,
}
FOLDERS = ("eval", "perf", "energy", "append", "kernels")


def record_files(results: Path) -> list[Path]:
    """Every record below a study's results folder.

    Raises:
        UserError: There is none.
    """
    found = [file for name in FOLDERS for file in sorted((results / name).rglob("*.json"))]
    if not found:
        raise UserError(f"--results: no record below {results} ({', '.join(FOLDERS)})")
    return found


def sealed(file: Path) -> str | None:
    """The text of a record of schema version 1 with its seal; None for one that has its seal.

    Raises:
        UserError: It is damaged, or says what its own numbers do not give.
    """
    raw: Any = read_json(file, "record")
    kind = KINDS.get(raw.get("kind", "") if isinstance(raw, dict) else "")
    if kind is None:
        raise UserError(f"{file}: field 'kind': is none of {', '.join(KINDS)}")
    if raw.get("schema_version") != 1:
        read_record(file, kind)
        return None
    raw |= {"schema_version": 2, "inputs": {}}
    try:
        text = record_text(kind.model_validate(raw))
    except ValueError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"{file}: {printable(first)}") from None
    record = parse_record(text, kind, file)
    if isinstance(record, EvalRecord):
        samples = file.with_name("samples.jsonl")
        verified_samples(record, read_text(samples, "samples", AGAIN), samples, AGAIN)
    content = parse_json(text)
    # Nothing but the version, the inputs and the seal may differ from what was measured.
    if {k: v for k, v in content.items() if k != "seal"} != raw:
        raise UserError(f"{file}: holds more than a record, or numbers in another form")
    return text


def seal_folder(results: Path) -> tuple[int, int]:
    """Seals the records of a study.

    Returns:
        How many were sealed, and how many had their seal.

    Raises:
        UserError: One line for every record that cannot be sealed; then none is.
    """
    texts: dict[Path, str] = {}
    problems: list[str] = []
    files = record_files(results)
    for file in files:
        try:
            text = sealed(file)
        except UserError as error:
            problems.append(str(error))
            continue
        if text is not None:
            texts[file] = text
    if problems:
        raise UserError("\n".join(problems))
    for file, text in texts.items():
        replace(file, text)
    return len(texts), len(files) - len(texts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant seal`."""
    parser.add_argument("--results", required=True, type=Path, help="the study's results folder")


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant seal`."""
    new, before = seal_folder(args.results)
    print(f"seal: {new} records sealed, {before} had their seal")
