"""Reads texts that the user wrote, with whatever program."""

from __future__ import annotations

import os
from pathlib import Path

from kvquant.formats.files import read_bytes, read_text

MARK = "\ufeff"  # byte order mark, which some editors put before UTF-8


def read_prose(path: str | Path, field: str) -> str:
    """Reads a UTF-8 text without a byte order mark, which is no part of what was written.

    Args:
        path: The file.
        field: What messages name.

    Raises:
        UserError: The file cannot be read or is not UTF-8.
    """
    return read_text(path, field).removeprefix(MARK)


def check_there(path: Path, field: str) -> None:
    """Refuses a missing file or a folder, before anything takes time.

    A pipe passes: it can be read once, later.

    Args:
        path: The file.
        field: What messages name.

    Raises:
        UserError: There is nothing to read.
    """
    if not os.path.exists(path) or path.is_dir():
        read_bytes(path, field)
