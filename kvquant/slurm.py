"""Jobs in Slurm that a killed run left behind: two jobs must never write one file."""

from __future__ import annotations

import shutil
import subprocess
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
