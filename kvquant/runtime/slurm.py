"""Before a run on Slurm: no jobs of a killed run are left, and short faults are survived."""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvquant.errors import UserError


def leftovers(folder: Path, attempts: int = 12, pause: float = 5.0) -> list[tuple[str, str, str]]:
    """(job id, state, rule) of the workflow's jobs with this working directory.

    Raises:
        UserError: The controller stayed silent, so nobody knows.
    """
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%k|%Z"]
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            rows = [line.split("|", 3) for line in done.stdout.splitlines() if line.count("|") > 2]
            return [
                (job, state, comment.removeprefix("rule_"))
                for job, state, comment, where in rows
                if comment.startswith("rule_") and Path(where).resolve() == folder.resolve()
            ]
    raise UserError(f"squeue: no answer in {attempts} attempts: {done.stderr.strip()}")


def prepare(folder: Path) -> None:
    """What a run on Slurm needs before its first job.

    Raises:
        UserError: Jobs of an earlier run in this folder are left.
    """
    refuse_leftovers(folder)
    patient_commands()


def refuse_leftovers(folder: Path) -> None:
    """Stops a run whose predecessor's jobs are still in Slurm.

    Raises:
        UserError: Jobs are left, by name, with what to do about them.
    """
    if shutil.which("squeue") is None:
        return  # sbatch will say so
    if left := leftovers(folder):
        ids = " ".join(job for job, _, _ in left)
        lines = [f"{job} {state} {rule}" for job, state, rule in left]
        raise UserError(
            f"{len(left)} job(s) of an earlier run in this folder are still in Slurm: wait for "
            f"them, or: scancel {ids}; then give the same command again\n" + "\n".join(lines)
        )


def patient_commands() -> None:
    """Puts stand-ins for Slurm's commands first in PATH: kvquant/runtime/slurm_client.py.

    `scontrol show config` is answered from now on as it is now. The executor reads MinJobAge there
    before each check and, while the controller is silent, would ask `sacct` instead, which has no
    answer where there is no accounting: it then forgets the jobs and waits for them for ever.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvquant-slurm-client."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("sbatch", "squeue", "sacctmgr"):
        if real := shutil.which(name):
            words = [sys.executable, "-m", "kvquant.runtime.slurm_client", real]
            _script(folder / name, f'exec {shlex.join(words)} "$@"')
    if real := shutil.which("scontrol"):
        done = subprocess.run([real, "show", "config"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            (folder / "config").write_text(done.stdout, encoding="utf-8")
            kept, given = shlex.quote(str(folder / "config")), shlex.quote(real)
            _script(
                folder / "scontrol",
                f'[ "$*" != "show config" ] || exec cat {kept}\nexec {given} "$@"',
            )
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def _script(file: Path, body: str) -> None:
    file.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    file.chmod(0o755)
