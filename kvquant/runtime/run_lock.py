"""A lock on a study's results folder that allows one run at a time.

Snakemake's own lock outlives a killed run and must be removed by hand. The kernel releases an
advisory `flock` when its process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from kvquant.errors import UserError
from kvquant.formats.files import make_folder

_held: list[IO[str]] = []  # open files, so that the locks live as long as this process


def refuse_files(folders: Mapping[str, str | Path]) -> None:
    """Refuses a study whose folders cannot be made, before Snakemake looks into them.

    Args:
        folders: The study's folders by the names of `pathvars`.

    Raises:
        UserError: A file stands where one of them, or a folder above it, should be.
    """
    for name, folder in folders.items():
        path = Path(folder)
        if any(part.exists() and not part.is_dir() for part in (path, *path.parents)):
            raise UserError(f"pathvars.{name}: {path}: a file stands where a folder should be")


def hold(folder: str | Path) -> None:
    """Locks a results folder until this process ends.

    On a file system without locks the folder stays unlocked (use Snakemake's `--lock` there).

    Raises:
        UserError: Another run has locked the folder.
    """
    file = Path(folder) / ".lock"
    make_folder(folder, "pathvars.results")
    try:
        handle = file.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"{folder}: another run is writing here: wait for it") from None
        return
    _held.append(handle)
