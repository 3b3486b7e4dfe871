"""The user's own cache folder: nobody else may write what this library reads back from it.

The folder is `$KVQUANT_CACHE`, else `kvquant` in `$XDG_CACHE_HOME` or `~/.cache`. What is kept
there only saves time: where the folder cannot be had, or is not the user's alone, nothing is.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

MAX_BYTES = 1 << 28  # of one file; a machine-code file has some hundred KB


def cache_folder() -> Path:
    """Where this library keeps what saves time.

    Raises:
        RuntimeError: No variable names a folder and the user has no home.
    """
    chosen = os.environ.get("KVQUANT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvquant"


def _owned(found: os.stat_result) -> bool:
    """Whether this user alone can write what was looked at."""
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def private_folder(folder: Path) -> Path | None:
    """A folder of this user alone, made with mode 0700 if it is missing.

    Args:
        folder: Where; its parents get the umask's mode.

    Returns:
        The folder; None if it is a link, of another user, writable by others, or cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except (OSError, ValueError):
        return None
    if not stat.S_ISDIR(found.st_mode) or not _owned(found):
        return None
    if found.st_mode & 0o077:  # others could only read: nothing in it is theirs
        with contextlib.suppress(OSError):
            folder.chmod(0o700)
    return folder


def read_private(file: Path) -> bytes | None:
    """Bytes of a regular file that this user alone can write; None for everything else.

    A link is not followed, and what is checked is what is read: the opened file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(file, flags)
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or not _owned(found) or found.st_size > MAX_BYTES:
            return None
        with os.fdopen(handle, "rb", closefd=False) as stream:
            return stream.read()
    except OSError:
        return None
    finally:
        os.close(handle)
