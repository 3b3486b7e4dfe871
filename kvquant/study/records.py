"""Reads and writes records and samples: sealed, written once and verified when read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvquant.errors import UserError, printable
from kvquant.formats.files import parse_json, read_text, sha256_text, write_new
from kvquant.formats.sealing import SEAL, check_seal, seal_of
from kvquant.study.record_checks import check_record
from kvquant.study.record_types import (
    SCHEMA_VERSION,
    AppendPoint,
    AppendRecord,
    EnergyRecord,
    EnergySide,
    EvalRecord,
    JobRecord,
    JobSide,
    JobTrial,
    KernelPart,
    KernelRecord,
    KernelSide,
    Percentiles,
    PerfSide,
    Record,
    ThroughputRecord,
)

__all__ = [
    "SCHEMA_VERSION",
    "AppendPoint",
    "AppendRecord",
    "EnergyRecord",
    "EnergySide",
    "EvalRecord",
    "JobRecord",
    "JobSide",
    "JobTrial",
    "KernelPart",
    "KernelRecord",
    "KernelSide",
    "Percentiles",
    "PerfSide",
    "Record",
    "ThroughputRecord",
    "absent",
    "parse_record",
    "read_record",
    "record_text",
    "write_record",
    "write_samples",
]

AGAIN = "delete it by name to measure it again"
R = TypeVar("R", bound=BaseModel)


def record_text(record: BaseModel) -> str:
    """Returns a record as indented JSON with its seal."""
    if isinstance(record, Record):
        content = json.loads(record.model_dump_json(exclude={SEAL}))
        record = record.model_copy(update={SEAL: seal_of(content)})
    return record.model_dump_json(indent=2) + "\n"


def write_record(path: str | Path, record: BaseModel) -> None:
    """Seals a record and writes it through :func:`kvquant.formats.files.write_new`.

    Raises:
        UserError: A derived field contradicts the others, the file exists with other content, or
            it cannot be written.
    """
    try:
        check_record(record)
        text = record_text(record)
    except ValueError as error:
        raise UserError(f"{path}: not written: {error}") from None
    write_new(path, text)


def write_samples(path: str | Path, rows: Iterable[dict[str, Any]]) -> str:
    """Writes per-sample rows as JSON Lines and returns the sha256 of the text.

    Raises:
        ValueError: A row holds NaN or an infinity.
    """
    text = "".join(
        json.dumps(row, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for row in rows
    )
    write_new(path, text)
    return sha256_text(text)


def absent(path: Path) -> bool:
    """Returns whether the path is free: no file, no folder and no dangling link."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def parse_record(text: str, model: type[R], where: str | Path, again: str = AGAIN) -> R:
    """Parses and verifies the text of a record; see :func:`read_record`."""
    try:
        raw = parse_json(text)
        if (
            isinstance(raw, dict)
            and raw.get("schema_version") == 1
            and "schema_version" in (model.model_fields)
        ):
            raise UserError(
                f"{where}: field 'schema_version': is 1, from before records were sealed, not "
                f"{SCHEMA_VERSION}: seal the records once with `kvquant seal --results FOLDER`"
            )
        record = model.model_validate(raw)
        if SEAL in model.model_fields:
            check_seal(raw)
        check_record(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"]) or "record"
        what = f"field '{field}': {first['msg']}"
    except (ValueError, ArithmeticError) as error:  # also numbers that cannot be divided or stored
        what = str(error)
    else:
        return record
    raise UserError(f"{where}: {printable(what)}: {again}")


def read_record(path: str | Path, model: type[R]) -> R:
    """Reads and verifies a record.

    Raises:
        UserError: The file is missing, truncated, not JSON, of another schema or changed after it
            was written; the message names the file and says how to measure it again.
    """
    file = Path(path)
    if absent(file):
        raise UserError(f"missing result: {file}")
    return parse_record(read_text(file, "record", AGAIN), model, file)
