"""Prepares a run on Slurm: refuses leftover jobs and makes Slurm's commands retry."""

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
    """Returns (job id, state, rule) of the workflow's jobs with this working directory.

    Args:
        folder: The working directory.
        attempts: Number of times to ask the controller.
        pause: Seconds between attempts.

    Raises:
        UserError: The controller did not answer.
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
    """Prepares a run on Slurm before its first job.

    Raises:
        UserError: Jobs of an earlier run in this folder are still in Slurm.
    """
    refuse_leftovers(folder)
    patient_commands()


def refuse_leftovers(folder: Path) -> None:
    """Stops a run whose predecessor's jobs are still in Slurm.

    Raises:
        UserError: Jobs are left; the message lists them and says what to do.
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
    """Puts wrappers of Slurm's commands (:mod:`kvquant.runtime.slurm_client`) first in PATH.

    From now on `scontrol show config` returns its present answer. The executor reads MinJobAge from
    it before each status check. If the controller does not answer, the executor asks `sacct`
    instead, gets nothing where there is no accounting, and then waits for its jobs for ever.
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
