"""Files that a killed job, a full disk or an editor may have damaged: reading and writing them.

Whatever is wrong with a file is reported as one line that names the field and the file. What is
written appears whole under its final name or not at all, with the mode that the umask gives.
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
STALE_SECONDS = 7 * 24 * 3600.0  # a temporary file of another machine is swept after that time
# What file systems without hard links answer to link(): exFAT, some FUSE and network mounts.
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def _message(field: str, what: str, again: str) -> UserError:
    return UserError(f"{field}: {what}" + (f": {again}" if again else ""))


def read_bytes(path: str | Path, field: str, again: str = "") -> bytes:
    """Reads a whole file.

    Args:
        path: The file.
        field: The option or file kind that names it in messages.
        again: How to get it made again, for messages.

    Raises:
        UserError: It is missing, a folder, a dangling link, or cannot be read.
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
        UserError: Also if its bytes are not UTF-8.
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
        raise ValueError(f"key '{printable(doubled)}' stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond every number that can be stored")
    return number


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings."""
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
    """Whether a string can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """Parses JSON strictly: no key twice in an object, nothing infinite, no deep nesting.

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
    """The one text of a JSON value that hashes are taken of: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: The value holds NaN or an infinity.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def write_json(value: Any) -> str:
    """A JSON value as the text of a file: indented, sorted keys, no NaN."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def sha256_text(text: str) -> str:
    """sha256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, hexadecimal, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inside(folder: str | Path, name: str, field: str) -> Path:
    """A path below a folder, from a name that a study or a manifest gives.

    Raises:
        UserError: The name is absolute, or leaves the folder.
    """
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not name or Path(name).is_absolute() or not path.is_relative_to(root) or path == root:
        raise UserError(f"{field}: '{name}' must be a name inside {folder}")
    return path


def expand(path: str, field: str) -> Path:
    """A path of a study, with `~` and `~USER` replaced by the home folder.

    Raises:
        UserError: There is no such user, or this one has no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{field}: '{path}': no home folder is known: write the path out") from None


def make_folder(path: str | Path, field: str) -> Path:
    """Makes a folder and those above it.

    Raises:
        UserError: A file stands in its way, or it may not be written there.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{field}: {folder}: a file stands where a folder should be") from None
    except OSError as error:
        raise UserError(f"{field}: {folder}: cannot be made ({error.strerror or error})") from None
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
    """Whether the process that made a temporary file has ended; on another machine, by age."""
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
    """A name beside `path` that no other process uses, be it on another machine."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def sweep(folder: str | Path, name: str = "*") -> int:
    """Removes temporary files of processes that ended before they were done.

    Args:
        folder: Where to look; not below it.
        name: Pattern of the final names.

    Returns:
        How many were removed.
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
    """Removes the temporary files of ended processes in a folder and all below it.

    Returns:
        How many were removed.
    """
    return sum(sweep(place) for place, _, _ in os.walk(folder))


def _fail(target: Path, error: OSError) -> UserError:
    return UserError(f"{target}: cannot be written ({error.strerror or error})")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    The file has the umask's mode, whatever the library that fills it gives it, and is flushed to
    disk before it gets its name.

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
    """Writes a whole file in place of what is there; see :func:`replacing`."""
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
    # No hard links here: who holds the lock looks and renames, so that nobody comes between.
    claim = target.with_name(f".{target.name}.claim")
    with claim.open("a", encoding="utf-8") as handle:
        with contextlib.suppress(OSError):  # nor locks: then the look has to do
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            if target.exists() or target.is_symlink():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            temporary.rename(target)
        finally:
            claim.unlink(missing_ok=True)  # whoever waits for it finds the target


def write_new(path: str | Path, content: str | bytes) -> None:
    """Creates `path` with `content`, whole or not at all; never replaces other content.

    It goes to a temporary file in the same folder, is flushed to disk and then linked to its final
    name, which fails if the name exists; on a file system without hard links it is renamed under a
    lock. The same content a second time is accepted.

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
