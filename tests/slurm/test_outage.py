"""The profile of the paper's cluster as it is, through minutes of a silent slurmctld."""

from __future__ import annotations

import re
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from tests.slurm.conftest import Workplace, put_study, stub_study
from tests.slurm.local_slurm import PARTITION, LocalSlurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SILENT = 110


def noticed(log: str) -> dict[str, tuple[datetime, datetime]]:
    """{Slurm id: (submitted, noticed as finished)}, from Snakemake's own time stamps."""
    since: dict[str, tuple[str, datetime]] = {}
    seen: dict[str, tuple[datetime, datetime]] = {}
    now = datetime.min
    for line in log.splitlines():
        if stamp := re.fullmatch(r"\[(\w+ \w+ +\d+ [\d:]+ \d+)\]", line.strip()):
            now = datetime.strptime(stamp[1], "%a %b %d %H:%M:%S %Y")
        elif match := re.search(r"Job (\d+) has been submitted with SLURM jobid (\d+)", line):
            since[match[1]] = (match[2], now)
        elif (match := re.search(r"Finished jobid: (\d+)", line)) and match[1] in since:
            job, start = since[match[1]]
            seen[job] = (start, now)
    return seen


def test_a_silent_controller_costs_time_and_nothing_else(
    root: Path, slurm: LocalSlurm, tmp_path: Path
) -> None:
    place = Workplace(root, tmp_path, slurm, stub=True)
    shutil.copy(root / "Snakefile", tmp_path)
    (tmp_path / "workflow").symlink_to(root / "workflow")
    study = stub_study(root)
    # a second model, fetched while the controller is silent: its jobs are submitted to nobody
    study["models"]["late"] = study["models"]["llama"]
    put_study(tmp_path, study)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/athena.yaml").write_text(yaml.safe_dump(study))
    place.fault("slow", "fetch-model --study results/paper/study.json --model late")
    place.fault("slow", "--model llama --scheme fp16 --task ppl")  # ends in the silence
    place.env["SNAKEMAKE_PROFILE"] = "workflow/profiles/athena"
    snakemake = str(Path(sys.executable).with_name("snakemake"))
    run = place.start([snakemake, "--executor", "slurm", "-j", "64"], "run.log")

    until("the slow evaluation", lambda: "--scheme fp16 --task ppl" in str(place.calls("begin")))
    slurm.kill("slurmctld")
    time.sleep(SILENT)
    assert run.poll() is None, place.text("run.log")
    slurm.start_controller()
    assert run.wait(timeout=900) == 0, place.text("run.log")[-6000:]

    jobs = slurm.jobs().values()
    print(slurm("squeue", "--states=all", "-o", "%i %P %T %S %e %k"))
    done = [f["Comment"] for f in jobs if f["JobState"] == "COMPLETED"]
    assert len(done) == len(set(done)) == 10, "a job was lost or done twice"
    assert "sbatch failed" not in place.text("run.log")
    # slurmctld starts jobs before it hears of the nodes' GPUs again: such a job costs an attempt
    for fields in (f for f in jobs if f["JobState"] != "COMPLETED"):
        said = next((tmp_path / "logs/slurm").rglob(f"{fields['JobId']}.log")).read_text()
        assert "Unable to create step for job" in said
        print(f"{fields['JobId']} began as slurmctld returned, and was tried again")
    assert {f["Partition"] for f in jobs} == {PARTITION}
    assert sorted(place.calls("begin")) == sorted(set(place.calls("end")))
    assert (tmp_path / "paper/figures/pareto.pdf").is_file()
    seconds = {
        job: (end - start).seconds for job, (start, end) in noticed(place.text("run.log")).items()
    }
    print(f"slurmctld silent for {SILENT} s; submit to noticed completion, s:", seconds)
