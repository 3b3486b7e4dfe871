"""A whole study on a real Slurm, through every fault that a cluster offers, against a local run."""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.slurm.conftest import Workplace, put_study, tiny_study
from tests.slurm.local_slurm import NODES, LocalSlurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
TABLES = ("eval.csv", "samples.csv", "tests.csv")


def state(slurm: LocalSlurm, comment: str) -> Counter[str]:
    """States of all jobs of one rule and its wildcards."""
    return Counter(f["JobState"] for f in slurm.jobs().values() if f["Comment"] == comment)


def running(slurm: LocalSlurm, comment: str) -> list[str]:
    """Ids of the running jobs of one rule and its wildcards."""
    found = slurm.jobs().items()
    return [i for i, f in found if f["Comment"] == comment and f["JobState"] == "RUNNING"]


def watch(
    place: Workplace, run: subprocess.Popen[str], log: str, victim: str, late: str
) -> list[float]:
    """Follows a run to its end. Seconds from submit to notice.

    Once they hang, `victim` is cancelled and `late` gets a limit of one minute; all jobs with that
    limit would end too early on a busy machine.
    """
    since: dict[str, float] = {}
    seen: dict[str, float] = {}
    cancelled = limited = False
    start = time.monotonic()
    while run.poll() is None and time.monotonic() - start < 900:
        text, now = place.text(log), time.monotonic()
        for job in re.findall(r"Job (\d+) has been submitted", text):
            since.setdefault(job, now)
        for job in re.findall(r"Finished jobid: (\d+)", text):
            if job in since:
                seen.setdefault(job, now)
        if not cancelled and not list(place.folder.glob("faults/hang-cancel")):
            for job in running(place.slurm, victim):
                place.slurm("scancel", job)
                cancelled = True
        if not limited and not list(place.folder.glob("faults/hang-limit")):
            for job in running(place.slurm, late):
                place.slurm("scontrol", "update", f"jobid={job}", "timelimit=1")
                limited = True
        time.sleep(0.3)
    assert run.poll() is not None, "still running\n" + place.text(log)[-4000:]
    return [seen[job] - since[job] for job in seen]


def test_nothing_is_lost_or_done_twice(
    root: Path, slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, plain = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("local")
    study = tiny_study(folder)
    place, local = Workplace(root, folder, slurm), Workplace(root, plain, slurm)
    for here in (folder, plain):
        put_study(here, study)
    hangs = {
        "lost": "--scheme fp16 --task ppl",
        "cancel": "--scheme nuq3-1pct --task ppl",
        "limit": "--scheme nuq3-1pct --task passkey",
    }
    for name, words in hangs.items():
        (folder / f"faults/hang-{name}").write_text(words)
    command = place.on_slurm("-j", "8", "--", "statistics")

    # both nodes drained: jobs wait, and start when the nodes are returned
    for node in NODES:
        slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    first = place.start(command, "first.log")
    until("pending jobs", lambda: len(slurm.active()) >= 4)
    time.sleep(3)
    pending = {f["JobState"] for f in slurm.jobs().values() if f["JobId"] in slurm.active()}
    assert pending == {"PENDING"}
    for node in NODES:
        slurm("scontrol", "update", f"nodename={node}", "state=resume")

    # Snakemake is killed while a job runs that will not end by itself
    lost = "rule_evaluate_wildcards_tiny_fp16_ppl"
    until("the hanging job", lambda: not (folder / "faults/hang-lost").exists())
    first.kill()
    first.wait()
    left = running(slurm, lost)
    assert len(left) == 1
    refused = place.start(command, "refused.log")
    assert refused.wait(timeout=240) != 0
    message = place.text("refused.log")
    assert "of an earlier run in this folder are still in Slurm" in message
    assert f"{left[0]} RUNNING evaluate_wildcards_tiny_fp16_ppl" in message
    slurm("scancel", left[0])
    until("an end of the others", lambda: not slurm.active())

    # the same command goes on; one job is cancelled, another runs over its limit
    second = place.start(command, "second.log")
    cancelled = "rule_evaluate_wildcards_tiny_nuq3-1pct_ppl"
    limited = "rule_evaluate_wildcards_tiny_nuq3-1pct_passkey"
    seconds = watch(place, second, "second.log", cancelled, limited)
    assert second.returncode == 0, place.text("second.log")[-4000:]
    print(slurm("squeue", "--states=all", "-o", "%i %T %M %l %N %r %k"))
    print("submit to noticed completion, s:", " ".join(f"{s:.0f}" for s in sorted(seconds)))
    assert state(slurm, lost) == {"CANCELLED": 1, "COMPLETED": 1}
    assert state(slurm, cancelled) == {"CANCELLED": 1, "COMPLETED": 1}
    assert state(slurm, limited) == {"TIMEOUT": 1, "COMPLETED": 1}
    done = [
        f["Comment"]
        for f in slurm.jobs().values()
        if f["JobState"] == "COMPLETED" and f["WorkDir"] == str(folder)
    ]
    assert len(done) == len(set(done)) == 11, done  # each job completed once

    again = subprocess.run(
        place.command("-n", "--nolock", "--", "statistics"),
        cwd=folder,
        env=place.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Nothing to be done" in again.stdout + again.stderr

    # the same study without Slurm
    alone = local.start(local.command("--cores", "2", "--", "statistics"), "local.log")
    assert alone.wait(timeout=900) == 0, local.text("local.log")[-4000:]
    for table in TABLES:
        ours = (folder / "results/tiny/tables" / table).read_bytes()
        assert ours == (plain / "results/tiny/tables" / table).read_bytes(), table
        print(f"{table}: {len(ours)} bytes, equal to the local run's")
