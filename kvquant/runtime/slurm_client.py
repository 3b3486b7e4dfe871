"""Wraps Slurm's commands while Snakemake runs, to work around faults of its executor (2.8.0).

The executor counts a short silence of the controller as a failed submission, so that a job uses up
its attempts within a minute. It also waits for ever for a preempted job, which `squeue` keeps
listing. :func:`kvquant.runtime.slurm.patient_commands` puts these wrappers first in PATH.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ATTEMPTS, PAUSE = 60, 20.0  # about 20 minutes, as the profiles allow for status checks
# Messages of the commands, in lower case, when the controller is busy, restarting or unreachable.
# It may have carried out the request even so, with only the answer lost.
PASSING = (
    "unable to contact slurm controller",
    "connection refused",
    "timed out",
    "unexpected message received",
    "zero bytes were transmitted or received",
    "transport endpoint is not connected",
    "resource temporarily unavailable",
    "temporarily unable to accept job",
    "connection reset by peer",
    "broken pipe",
    "communication connection failure",
    "communications connection failure",
    "controller in standby mode",
)


class Silent(Exception):
    """Raised when the controller does not answer, so that the state of a job is unknown."""


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def accepted(sbatch: Sequence[str], squeue: str) -> str | None:
    """Returns the id of the job that an unanswered `sbatch` submitted, or None.

    Snakemake gives all jobs of a run the same name and tells them apart by their comments, of
    which one is active at a time.

    Raises:
        Silent: `squeue` does not answer either.
    """
    given = dict(itertools.pairwise(sbatch))
    name, comment = given.get("--job-name"), given.get("--comment")
    if name is None or comment is None:
        return None
    listed = _run([squeue, "--noheader", "--format=%i|%k", "--name", name])
    if listed.returncode:
        raise Silent
    found = [line.split("|", 1) for line in listed.stdout.splitlines() if "|" in line]
    return next((job for job, said in found if said.strip() == comment), None)


def patient(
    command: Sequence[str], attempts: int = ATTEMPTS, pause: float = PAUSE
) -> subprocess.CompletedProcess[str]:
    """Repeats a command while its daemon has a transient fault, and returns any other answer.

    A submission is repeated only after `squeue` has confirmed that the last one left no job.
    """
    submits = Path(command[0]).name == "sbatch"
    done = _run(command)
    for _ in range(attempts - 1):
        error = done.stderr.lower()
        if done.returncode == 0 or not any(text in error for text in PASSING):
            break
        time.sleep(pause)
        if submits:
            try:
                job = accepted(command, str(Path(command[0]).with_name("squeue")))
            except Silent:
                continue
            if job is not None:
                return subprocess.CompletedProcess(command, 0, f"{job}\n", "")
        done = _run(command)
    return done


def ended(listing: str) -> str:
    """Returns a listing of `id|state` lines with preempted jobs shown as cancelled.

    A job that Slurm requeues is listed as pending, so PREEMPTED means that the job has ended.
    """
    rows = [re.sub(r"\|PREEMPTED$", "|CANCELLED", line) for line in listing.splitlines()]
    return "".join(f"{row}\n" for row in rows)


def main(command: Sequence[str]) -> int:
    """Runs one of Slurm's commands, given by its path, and passes on its output and exit status."""
    if Path(command[0]).name == "squeue":
        done = _run(command)
        sys.stdout.write(ended(done.stdout))
    else:
        done = patient(command)
        sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
