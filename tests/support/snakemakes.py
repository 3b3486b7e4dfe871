"""Runs Snakemake for tests without importing it anew each time (see :mod:`snakemake_server`)."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = Path(__file__).with_name("snakemake_server.py")


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Starts the process that runs Snakemake for all tests of this one."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.Popen(
        [sys.executable, "-P", str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert found.stdin is not None
    atexit.register(found.wait)
    atexit.register(found.stdin.close)
    return found


def run_snakemake(
    args: Sequence[str | Path], cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m snakemake ARGS` in a folder, and returns its status and output.

    Args:
        args: The arguments.
        cwd: The folder.
        env: The environment; None: that of the tests.
    """
    server, words = _server(), list(map(str, args))
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = {name: os.path.join(folder, name) for name in ("stdout", "stderr")}
        request = {"args": words, "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        print(json.dumps(request | files), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the server of Snakemake has ended"
        told = [Path(files[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(["snakemake", *words], int(answer), *told)
