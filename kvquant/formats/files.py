"""Robust reading and atomic writing of files that a killed job or a full disk may damage.

Every fault of a file is reported as one line that names the field and the file. A written file
appears whole under its final name or not at all, with the mode that the umask gives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from kvquant.errors import UserError, printable

MAX_JSON_DEPTH = 64
STALE_SECONDS = 7 * 24 * 3600.0  # age at which another machine's temporary file is removed
# Errors of link() on file systems without hard links: exFAT, some FUSE and network mounts.
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def _message(field: str, what: str, again: str) -> UserError:
    return UserError(f"{field}: {what}" + (f": {again}" if again else ""))


def read_bytes(path: str | Path, field: str, again: str = "") -> bytes:
    """Reads a whole file.

    Args:
        path: The file.
        field: The option or kind of file that messages name.
        again: How the user makes the file again, for messages.

    Raises:
        UserError: The file is missing, a folder, a dangling link, or cannot be read.
    """
    file = Path(path)
    try:
        return file.read_bytes()
    except FileNotFoundError:
        if not file.is_symlink():
            raise _message(field, f"no such file: {file}", again) from None
        what = "a link to nothing"
    except IsADirectoryError:
        what = "a folder, not a file"
    except NotADirectoryError:
        what = "a file stands where a folder of its path should be"
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        what = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise _message(field, f"{file}: {what}", again)


def read_text(path: str | Path, field: str, again: str = "") -> str:
    """Reads a UTF-8 text; see :func:`read_bytes`.

    Raises:
        UserError: The file cannot be read or is not UTF-8.
    """
    raw = read_bytes(path, field, again)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"damaged: byte {error.start} is not UTF-8"
        raise _message(field, f"{path}: {what}", again) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key '{printable(doubled)}' is given twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond every number that can be stored")
    return number


def _depth(text: str) -> int:
    """Returns the greatest nesting depth of brackets outside strings."""
    depth = deepest = 0
    inside = escaped = False
    for character in text:
        if inside:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                inside = False
        elif character == '"':
            inside = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def is_text(text: str) -> bool:
    """Returns whether a string can be encoded as UTF-8, that is, has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """Parses JSON strictly: no duplicate keys, no NaN or infinity, no deep nesting.

    Raises:
        ValueError: The text is not such JSON; the message is one line.
    """
    if not text.strip():
        raise ValueError("empty JSON")
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _depth(text) > MAX_JSON_DEPTH:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} levels deep")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"truncated or damaged JSON at character {error.pos}") from None
    if _SURROGATE.search(text) and not is_text(json.dumps(value, ensure_ascii=False)):
        raise ValueError("a lone surrogate in JSON, which is half of a character")
    return value


def read_json(path: str | Path, field: str, again: str = "") -> Any:
    """Reads a JSON file strictly; see :func:`parse_json` and :func:`read_bytes`.

    Raises:
        UserError: It cannot be read or is not strict JSON.
    """
    text = read_text(path, field, again)
    try:
        return parse_json(text)
    except ValueError as error:
        raise _message(field, f"{path}: {error}", again) from None


def canonical_json(value: Any) -> str:
    """Returns the canonical JSON that hashes are taken of: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: The value holds NaN or an infinity.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def json_text(value: Any) -> str:
    """Returns a JSON value as the content of a file: indented, sorted keys, no NaN."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def sha256_text(text: str) -> str:
    """Returns the sha256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Returns the sha256 of a file in hexadecimal, reading it in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def path_inside(folder: str | Path, name: str, field: str) -> Path:
    """Returns the path of `name` below `folder`, for names from a study or a manifest.

    Raises:
        UserError: The name is absolute or leads out of the folder.
    """
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not name or Path(name).is_absolute() or not path.is_relative_to(root) or path == root:
        raise UserError(f"{field}: '{name}' must be a name inside {folder}")
    return path


def expand_home(path: str, field: str) -> Path:
    """Returns a path with `~` and `~USER` replaced by the home folder.

    Raises:
        UserError: There is no such user or home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{field}: '{path}': no home folder is known: write the path out") from None


def make_folder(path: str | Path, field: str) -> Path:
    """Makes a folder and its parents.

    Raises:
        UserError: A file is in the way, or the folder cannot be written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{field}: {folder}: a file stands where a folder should be") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{field}: {folder}: cannot be made ({what})") from None
    return folder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _abandoned(file: Path, now: float) -> bool:
    """Returns whether the process that made a temporary file has ended.

    For a file of another machine, its age decides.
    """
    parts = file.name.rsplit(".", 3)  # .NAME, NODE, PID, tmp (a node's name may hold dots)
    pid = parts[-2] if len(parts) == 4 else ""
    if not pid.isdigit():
        return False
    if file.name.endswith(f".{platform.node()}.{pid}.tmp"):
        return not _alive(int(pid))
    try:
        return now - file.stat().st_mtime > STALE_SECONDS
    except OSError:
        return False


def temporary_name(path: Path) -> Path:
    """Returns a name beside `path` that no other process uses on any machine."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def sweep(folder: str | Path, name: str = "*") -> int:
    """Removes the temporary files that ended processes left behind.

    Args:
        folder: The folder to search, without those below it.
        name: Pattern of the final names.

    Returns:
        The number of removed files.
    """
    count = 0
    now = time.time()
    for file in Path(folder).glob(f".{name}.tmp"):
        if _abandoned(file, now):
            with contextlib.suppress(OSError):
                file.unlink()
                count += 1
    return count


def sweep_tree(folder: str | Path) -> int:
    """Removes the temporary files of ended processes in a folder and all folders below it.

    Returns:
        The number of removed files.
    """
    return sum(sweep(place) for place, _, _ in os.walk(folder))


def _fail(target: Path, error: OSError) -> UserError:
    return UserError(f"{target}: cannot be written ({error.strerror or error})")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file that replaces `path` when the block ends without an error.

    The file gets the umask's mode, even where the library that fills it sets another, and is
    flushed to disk before it gets its name.

    Raises:
        UserError: The folder or the file cannot be written.
    """
    target = Path(path)
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, f"{glob.escape(target.name)}.*")
        with open(temporary, "wb") as stream:
            mode = os.fstat(stream.fileno()).st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise _fail(target, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace(path: str | Path, content: str | bytes) -> None:
    """Replaces a file by new content, atomically; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _publish(temporary: Path, target: Path) -> None:
    """Gives a file its final name.

    Raises:
        FileExistsError: The name is taken.
    """
    try:
        os.link(temporary, target)
        return
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
    # No hard links here: a lock keeps other processes out between the check and the rename.
    claim = target.with_name(f".{target.name}.claim")
    with claim.open("a", encoding="utf-8") as handle:
        with contextlib.suppress(OSError):  # without locks either, the check alone has to do
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            if target.exists() or target.is_symlink():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            temporary.rename(target)
        finally:
            claim.unlink(missing_ok=True)  # a process that waits for the lock finds the target


def write_new(path: str | Path, content: str | bytes) -> None:
    """Creates `path` with `content` atomically and never replaces other content.

    The content goes to a temporary file in the same folder, is flushed to disk and then linked to
    its final name, which fails if the name exists. On a file system without hard links the file is
    renamed under a lock. Writing the same content again is accepted.

    Raises:
        UserError: `path` exists with other content, or cannot be written.
    """
    target = Path(path)
    raw = content.encode() if isinstance(content, str) else content
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, f"{glob.escape(target.name)}.*")
        with open(temporary, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            _publish(temporary, target)
        except FileExistsError:
            if not target.is_file() or target.read_bytes() != raw:
                raise UserError(
                    f"{target} exists with other content and is not overwritten: "
                    "delete it by name to measure again"
                ) from None
    except OSError as error:
        raise _fail(target, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
