"""`kvquant seal`: adds seals to records of schema version 1 without measuring them again.

Records of schema version 1 have no seal. Everything that can be recomputed from the record and its
samples is checked first. If one record fails, the whole folder is left unchanged.
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
    JobRecord,
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
    "jobs": JobRecord,
}
FOLDERS = ("eval", "perf", "energy", "append", "kernels", "jobs")


def record_files(results: Path) -> list[Path]:
    """Returns the files of all records below a study's results folder.

    Raises:
        UserError: There is no record.
    """
    found = [file for name in FOLDERS for file in sorted((results / name).rglob("*.json"))]
    if not found:
        raise UserError(f"--results: no record below {results} ({', '.join(FOLDERS)})")
    return found


def sealed(file: Path) -> str | None:
    """Returns the sealed text of a record of schema version 1, or None for one with a seal.

    Raises:
        UserError: The record is damaged or contradicts itself.
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
    # Only the version, the inputs and the seal may differ from the original record.
    if {k: v for k, v in content.items() if k != "seal"} != raw:
        raise UserError(f"{file}: holds more than a record, or numbers in another form")
    return text


def seal_folder(results: Path) -> tuple[int, int]:
    """Seals the records of a study, or none of them if one cannot be sealed.

    Returns:
        The number of newly sealed records and of those that had a seal.

    Raises:
        UserError: Some records cannot be sealed; the message has one line for each.
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


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant seal`."""
    new, before = seal_folder(args.results)
    print(f"seal: {new} records sealed, {before} already had a seal")
