"""Stands before Slurm's commands while Snakemake runs, for faults of its executor (2.8.0).

The executor takes a moment of a silent controller for a failed submission, which costs a job all
its attempts within a minute, and waits for ever for a preempted job, which `squeue` lists until it
is forgotten. :func:`kvquant.slurm.patient_commands` puts these stand-ins first in PATH.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ATTEMPTS, PAUSE = 60, 20.0  # about 20 minutes, as the profiles grant to status checks
# No connection was made, so nothing was accepted and asking again is safe.
UNREACHABLE = ("unable to contact slurm controller", "connection refused")
UNCERTAIN = "timed out"  # the job may have been accepted and its id lost on the way


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def accepted(sbatch: Sequence[str], squeue: str) -> str | None:
    """The id of the waiting or running job that an `sbatch` without an answer left, if any.

    Snakemake names all jobs of a run alike and tells them apart by their comments; one of each is
    active at a time.
    """
    given = dict(itertools.pairwise(sbatch))
    name, comment = given.get("--job-name"), given.get("--comment")
    if name is None or comment is None:
        return None
    listed = _run([squeue, "--noheader", "--format=%i|%k", "--name", name])
    found = [line.split("|", 1) for line in listed.stdout.splitlines() if "|" in line]
    return next((job for job, said in found if said.strip() == comment), None)


def patient(
    command: Sequence[str], attempts: int = ATTEMPTS, pause: float = PAUSE
) -> subprocess.CompletedProcess[str]:
    """Repeats a command while its daemon cannot be reached; any other answer is the answer."""
    submits = Path(command[0]).name == "sbatch"
    for _ in range(attempts - 1):
        done = _run(command)
        error = done.stderr.lower()
        if done.returncode == 0:
            return done
        uncertain = submits and UNCERTAIN in error
        if not uncertain and not any(text in error for text in UNREACHABLE):
            return done
        time.sleep(pause)
        if uncertain and (job := accepted(command, str(Path(command[0]).with_name("squeue")))):
            return subprocess.CompletedProcess(command, 0, job + "\n", "")
    return _run(command)


def ended(listing: str) -> str:
    """A listing of `id|state` in which preempted jobs count as cancelled.

    A job that Slurm puts back into the queue is listed as pending, so PREEMPTED is an end.
    """
    rows = [re.sub(r"\|PREEMPTED$", "|CANCELLED", line) for line in listing.splitlines()]
    return "".join(f"{row}\n" for row in rows)


def main(command: Sequence[str]) -> int:
    """Runs one of Slurm's commands, given by its path, and passes its answer on."""
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
