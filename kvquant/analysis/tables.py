"""Writes and reads collected tables: sealed parquet files, each with a CSV twin.

The seal stands in the parquet file's own metadata, as a text of fixed length: a hash over all bytes
of the file in which it counts as zeros. So any changed byte is found before a library parses it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kvquant.errors import UserError, printable
from kvquant.formats.files import read_bytes, replace

FLOAT_FORMAT = "%.10g"
AGAIN = "make it again (`kvquant aggregate`, then what follows)"
UNSEALED = "{}: note: has no seal and no CSV twin (not written by kvquant), taken as it is"
_MARK, _EMPTY = b"kvquant-seal:", b"0" * 64
_SEAL = re.compile(rb"kvquant-seal:([0-9a-f]{64})")
_KEY = b"kvquant"
_READING: ContextVar[set[str] | None] = ContextVar("reading", default=None)


def _seal_of(raw: bytes) -> tuple[str, str] | None:
    """Returns the seal that a file holds and the one that it should hold; None without a seal."""
    found = list(_SEAL.finditer(raw))
    if len(found) != 1:
        return None
    start, end = found[0].span(1)
    blank = raw[:start] + _EMPTY + raw[end:]
    return found[0][1].decode(), hashlib.sha256(blank).hexdigest()


def _sealed(raw: bytes) -> bytes:
    assert raw.count(_MARK + _EMPTY) == 1
    seal = hashlib.sha256(raw).hexdigest().encode()
    return raw.replace(_MARK + _EMPTY, _MARK + seal)


def write_table(table: pd.DataFrame, path: Path, made_from: Iterable[Path] = ()) -> None:
    """Writes `path` (.parquet) and its CSV twin, each of them whole or not at all.

    Args:
        table: The table, without its index.
        path: The parquet file.
        made_from: The tables (.parquet) that it was computed from; a later reader is told if those
            beside it are others by then.
    """
    text = table.to_csv(index=False, float_format=FLOAT_FORMAT).encode()
    sources = {source.stem: _read(source)[1] for source in made_from}
    facts = {"csv_sha256": hashlib.sha256(text).hexdigest(), "made_from": sources}
    plain = pa.Table.from_pandas(table, preserve_index=False)
    held = json.dumps(facts, sort_keys=True).encode() + b" " + _MARK + _EMPTY
    buffer = io.BytesIO()
    pq.write_table(
        plain.replace_schema_metadata({**(plain.schema.metadata or {}), _KEY: held}), buffer
    )
    replace(path.with_suffix(".csv"), text)
    replace(path, _sealed(buffer.getvalue()))


def _foreign(raw: bytes, path: Path) -> bool:
    """Returns whether a file without a seal came from elsewhere and did not lose its seal."""
    ours = b"csv_sha256" in raw or b"made_from" in raw or path.with_suffix(".csv").exists()
    return not ours


def _read(path: Path) -> tuple[bytes, str]:
    """Returns the bytes of a table and its checked seal; no seal for a file from elsewhere.

    Raises:
        UserError: The file is missing, or was not written so by :func:`write_table`.
    """
    raw = read_bytes(path, "--tables", AGAIN)
    seals = _seal_of(raw)
    if seals is None and _foreign(raw, path):
        print(UNSEALED.format(path), file=sys.stderr)
        return raw, ""
    if seals is None:
        raise UserError(f"--tables: {path}: has no seal, or is damaged: {AGAIN}")
    if seals[0] != seals[1]:
        raise UserError(f"--tables: {path}: was changed after it was written: {AGAIN}")
    return raw, seals[0]


def _facts(table: pa.Table) -> dict[str, Any]:
    held = (table.schema.metadata or {})[_KEY]
    facts = json.loads(held[: held.index(b" " + _MARK)])
    return dict(facts)


@contextmanager
def reading() -> Iterator[set[str]]:
    """Yields a set that gets the names of all tables that are read in the block."""
    names: set[str] = set()
    token = _READING.set(names)
    try:
        yield names
    finally:
        _READING.reset(token)


def sources_of(folder: Path, names: Iterable[str]) -> set[str]:
    """Returns the names of collected tables that tables were computed from, and their own."""
    found = set(names)
    for name in names:
        raw, seal = _read(folder / f"{name}.parquet")
        if seal:
            found |= set(_facts(pq.read_table(io.BytesIO(raw)))["made_from"])
    return found


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """Reads a collected table.

    Raises:
        UserError: It does not exist, was changed, is not what its CSV twin says, or was computed
            from other tables than those beside it.
    """
    if (names := _READING.get()) is not None:
        names.add(name)
    file = folder / f"{name}.parquet"
    if not file.exists() and not file.is_symlink():
        raise UserError(f"--tables: no {name}.parquet in {folder}: run `aggregate` first")
    raw, seal = _read(file)
    try:
        table = pq.read_table(io.BytesIO(raw))
        facts = _facts(table) if seal else {"made_from": {}}
        frame: pd.DataFrame = table.to_pandas()
    except Exception as error:  # whatever a parser makes of bytes that are not its own
        first = printable((str(error) or type(error).__name__).splitlines()[0])
        raise UserError(f"--tables: {file}: cannot be read ({first}): {AGAIN}") from None
    twin = file.with_suffix(".csv")
    if seal and twin.exists():
        text = read_bytes(twin, "--tables", AGAIN)
        if hashlib.sha256(text).hexdigest() != facts["csv_sha256"]:
            raise UserError(f"--tables: {twin}: is not the table of {file.name} beside it: {AGAIN}")
    for source, seal in facts["made_from"].items():
        other = folder / f"{source}.parquet"
        if other.exists() and _read(other)[1] != seal:
            raise UserError(
                f"--tables: {file}: was computed from another {other.name} than the one beside it: "
                f"{AGAIN}"
            )
    return frame
