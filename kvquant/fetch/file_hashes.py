"""sha256 of files, cached while a file's path, size, inode and times stay the same.

Hashing a model's weights can take a minute, so the hash of an unchanged file is kept in the user's
cache folder. A file counts as unchanged if its path, size, inode, modification time and inode
change time, in nanoseconds, are the same. The kernel sets the last at every write, rename and
change of times, and no program can set it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from kvquant.errors import UserError
from kvquant.formats.files import parse_json, replace, sha256_text
from kvquant.runtime.private_folder import cache_folder, private_folder, read_private

# A file that was changed shortly before it was hashed could change again within the same tick of
# the file system's clock without a difference in its times.
SETTLED_NS = 2_000_000_000
PIECE = 1 << 22


def _state(file: Path) -> list[int]:
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _store(folder: Path) -> Path | None:
    """Returns the cache file with the hashes of a folder, or None without a cache folder."""
    with contextlib.suppress(RuntimeError):
        place = private_folder(cache_folder())
        kept = private_folder(place / "hashes") if place else None
        return kept / f"{sha256_text(str(folder))[:32]}.json" if kept else None
    return None


def _remembered(store: Path | None) -> dict[str, list[int | str]]:
    raw = read_private(store) if store is not None else None
    if raw is None:
        return {}
    try:
        found = parse_json(raw.decode("utf-8"))
    except ValueError:  # truncated by a full disk: hash again
        return {}
    return found if isinstance(found, dict) else {}


class FileHashes:
    """Computes and caches hashes of the files in one folder.

    Args:
        folder: The folder.
        field: The option that messages name.
    """

    def __init__(self, folder: str | Path, field: str) -> None:
        self.folder = Path(folder).resolve()
        self.field = field
        self._store = _store(self.folder)
        self._known = _remembered(self._store)
        self._start = time.time_ns()
        self._new: dict[str, list[int | str]] = {}

    def _read(self, names: list[str]) -> tuple[str, dict[str, str]]:
        """Returns the sha256 of the concatenated files, and of each file."""
        whole, each = hashlib.sha256(), {}
        for name in names:
            one = hashlib.sha256()
            try:
                with open(self.folder / name, "rb") as stream:
                    while piece := stream.read(PIECE):
                        one.update(piece)
                        if len(names) > 1:
                            whole.update(piece)
            except OSError as error:
                raise UserError(
                    f"{self.field}: {self.folder / name}: cannot be read "
                    f"({error.strerror or error})"
                ) from None
            each[name] = one.hexdigest()
        return (whole.hexdigest() if len(names) > 1 else each[names[0]]), each

    def _states(self, names: list[str]) -> list[int]:
        try:
            return [number for name in names for number in _state(self.folder / name)]
        except OSError as error:
            raise UserError(
                f"{self.field}: {error.filename}: cannot be read ({error.strerror or error})"
            ) from None

    def _keep(self, key: str, states: list[int], digest: str) -> None:
        times = [stamp for at in (1, 2) for stamp in states[at::4]]
        if max(times) < self._start - SETTLED_NS:
            self._new[key] = [digest, *states]

    def _recall(self, key: str, states: list[int]) -> str | None:
        found = self._known.get(key)
        if isinstance(found, list) and found[1:] == states and isinstance(found[0], str):
            return found[0]
        return None

    def of(self, name: str) -> str:
        """Returns the sha256 of one file.

        Raises:
            UserError: The file cannot be read.
        """
        states = self._states([name])
        known = self._recall(name, states)
        if known is not None:
            return known
        digest, _ = self._read([name])
        if self._states([name]) == states:
            self._keep(name, states, digest)
        return digest

    def of_all(self, names: list[str]) -> tuple[str, dict[str, str]]:
        """Returns the sha256 of the concatenated files, and of each, reading every file once.

        Args:
            names: One or more file names.

        Raises:
            UserError: A file cannot be read.
        """
        states = self._states(names)
        key = "\n".join(["", *names])
        whole = self._recall(key, states)
        parts = [self._recall(name, states[4 * i : 4 * i + 4]) for i, name in enumerate(names)]
        each = {n: p for n, p in zip(names, parts, strict=True) if p is not None}
        if whole is not None and len(each) == len(names):
            return whole, each
        whole, each = self._read(names)
        if self._states(names) == states:
            self._keep(key, states, whole)
            for i, name in enumerate(names):
                self._keep(name, states[4 * i : 4 * i + 4], each[name])
        return whole, each

    def remember(self) -> None:
        """Writes new hashes to the cache file, if there is one."""
        if self._store is None or not self._new:
            return
        with contextlib.suppress(UserError):
            replace(self._store, json.dumps({**self._known, **self._new}))
        self._known |= self._new
        self._new = {}
