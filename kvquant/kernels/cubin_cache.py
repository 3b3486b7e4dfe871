"""Keeps compiled kernels on disk, so that other processes need not compile them again.

The files hold machine code that is run as it is found. So they are read only from a folder and from
files that this user alone can write (:mod:`kvquant.runtime.private_folder`), and each file begins
with a hash of its content. Whatever is wrong with the folder, kernels are compiled as without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from kvquant.runtime.private_folder import cache_folder as folder
from kvquant.runtime.private_folder import private_folder, read_private


def cached(key: list[bytes], make: Callable[[], bytes]) -> bytes:
    """Returns what `make` returns, or what it returned before for the same key.

    A file begins with the SHA-256 of the rest. One that was cut short or changed is made again.

    Args:
        key: Everything that the result depends on.
        make: Called if there is no valid file; what it raises passes through.
    """
    # Lengths go in too, so that two lists with the same concatenation differ.
    parts = b"".join(len(part).to_bytes(8, "little") + part for part in key)
    try:
        place = private_folder(folder())
    except RuntimeError:  # no home
        place = None
    if place is None:
        return make()
    file = place / f"{hashlib.sha256(parts).hexdigest()}.cubin"
    found = read_private(file) or b""
    if len(found) > 32 and hashlib.sha256(found[32:]).digest() == found[:32]:
        return found[32:]
    made = make()
    with contextlib.suppress(OSError):
        _write(file, hashlib.sha256(made).digest() + made)
    return made


def _write(file: Path, content: bytes) -> None:
    """Writes a file so that other processes see all of it or nothing."""
    handle, name = tempfile.mkstemp(prefix=".new-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(name, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
