"""The user's private cache folder, which no other user may write.

The folder is `$KVQUANT_CACHE`, else `kvquant` in `$XDG_CACHE_HOME` or `~/.cache`. Its content only
saves time, so nothing is cached if the folder cannot be made or other users can write it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

MAX_BYTES = 1 << 28  # per file; a compiled kernel has some hundred KB


def cache_folder() -> Path:
    """Returns the path of the library's cache folder.

    Raises:
        RuntimeError: No variable names a folder and the user has no home folder.
    """
    chosen = os.environ.get("KVQUANT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvquant"


def _owned(found: os.stat_result) -> bool:
    """Returns whether only this user can write a file or folder."""
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def private_folder(folder: Path) -> Path | None:
    """Returns a folder that only this user can write, making it with mode 0700 if missing.

    Args:
        folder: Path of the folder; missing parents get the umask's mode.

    Returns:
        The folder, or None if it is a link, belongs to another user, is writable by others, or
        cannot be made.
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
    if found.st_mode & 0o077:  # others could only read it, so its content is trusted
        with contextlib.suppress(OSError):
            folder.chmod(0o700)
    return folder


def read_private(file: Path) -> bytes | None:
    """Returns the content of a regular file that only this user can write, else None.

    Links are not followed, and the opened file itself is checked, so that it cannot be exchanged.
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
