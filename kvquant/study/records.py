"""Records and samples on disk: sealed and written once and atomically, verified when read."""

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
    """A record as it is written: indented JSON with its seal."""
    if isinstance(record, Record):
        content = json.loads(record.model_dump_json(exclude={SEAL}))
        record = record.model_copy(update={SEAL: seal_of(content)})
    return record.model_dump_json(indent=2) + "\n"


def write_record(path: str | Path, record: BaseModel) -> None:
    """Seals a record and writes it through :func:`kvquant.formats.files.write_new`.

    Raises:
        UserError: A derived field is not what the others give; or the file is there with other
            content, or cannot be written.
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
    """Whether nothing at all has this name: no file, no folder, no link to nothing."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def parse_record(text: str, model: type[R], where: str | Path) -> R:
    """A record from its text; see :func:`read_record`."""
    try:
        raw = parse_json(text)
        if (
            isinstance(raw, dict)
            and raw.get("schema_version") == 1
            and "schema_version" in (model.model_fields)
        ):
            raise UserError(
                f"{where}: field 'schema_version': is 1, of before records were sealed, now it is "
                f"{SCHEMA_VERSION}: seal what is there once with `kvquant seal --results FOLDER`"
            )
        record = model.model_validate(raw)
        if SEAL in model.model_fields:
            check_seal(raw)
        check_record(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"]) or "record"
        what = f"field '{field}': {first['msg']}"
    except (ValueError, ArithmeticError) as error:  # numbers that cannot be divided or stored
        what = str(error)
    else:
        return record
    raise UserError(f"{where}: {printable(what)}: {AGAIN}")


def read_record(path: str | Path, model: type[R]) -> R:
    """Reads and verifies a record.

    Raises:
        UserError: The file is missing, truncated, not JSON, of another schema, or was changed after
            it was written; the message names the file and says how to get it measured again.
    """
    file = Path(path)
    if absent(file):
        raise UserError(f"missing result: {file}")
    return parse_record(read_text(file, "record", AGAIN), model, file)
