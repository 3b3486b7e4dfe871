"""The smoke study, computed by GPU rules on a real Slurm and without it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.slurm.conftest import Workplace
from tests.slurm.local_slurm import ACCOUNT, PARTITION, LocalSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
TABLES = ("eval.csv", "samples.csv", "tests.csv")
ONE_THREAD = ("--set-threads", "calibrate=1", "evaluate=1")  # sums in one order everywhere


def test_slurm_and_a_local_run_give_the_same_tables(
    root: Path, any_slurm: LocalSlurm, tmp_path: Path
) -> None:
    slurm = any_slurm
    study = yaml.safe_load((root / "config/smoke.yaml").read_text())
    study.pop("kernels")  # asks for a device of that many GPUs
    study["gpus"] = 8  # the requests of the paper's study; its verbs work on the CPU (conftest)
    for model in study["models"].values():
        model.update(gpus=1, mem_gb=128)
    study["pathvars"]["cache"] = str(root / "resources")  # models and texts: fetched once
    places = {}
    for name in ("slurm", "local"):
        (tmp_path / name).mkdir()
        places[name] = Workplace(root, tmp_path / name, slurm)
        (tmp_path / name / "study.yaml").write_text(yaml.safe_dump(study))
    place, local = places["slurm"], places["local"]
    run = place.start(place.on_slurm("-j", "4", *ONE_THREAD), "run.log")
    assert run.wait(timeout=1800) == 0, place.text("run.log")[-5000:]
    fields = "JobID,Partition,Account,Comment%60,State,ReqTRES%75,NodeList,Elapsed"
    print(slurm("sacct", "-X", "-P", "-o", fields))

    jobs = slurm.jobs()
    for job in jobs.values():
        assert (job["JobState"], job["Partition"], job["Account"]) == (
            *("COMPLETED", PARTITION, ACCOUNT),
        )
        whole = job["Comment"].startswith(("rule_throughput", "rule_energy"))
        gpus = (
            0 if job["Comment"].startswith(("rule_quantize", "rule_prompts")) else 8 if whole else 1
        )
        assert job.get("TresPerJob") == (f"gres:gpu:a100:{gpus}" if gpus else None)
        assert job["MinMemoryNode"] == {0: "4000M", 1: "125G", 8: "1000G"}[gpus]
    cells = len(study["schemes"]) * len(study["tasks"])
    rules = Counter(job["Comment"].split("_")[1] for job in jobs.values())
    expected = {"calibrate": 1, "quantize": 2, "evaluate": cells, "throughput": 1, "energy": 1}
    assert rules.pop("prompts", 2) == 2  # none where the folder of fetched files holds them
    assert rules == expected
    done = Counter(place.calls("end"))
    assert len(done) == len(jobs) and set(done.values()) == {1}
    assert (place.folder / "results/smoke/report.html").is_file()

    cores = str(os.cpu_count() or 2)
    words = local.command("--cores", cores, "--resources", "gpu=8", *ONE_THREAD)
    alone = local.start([*words, "--nolock", "--", "statistics"], "local.log")
    assert alone.wait(timeout=1800) == 0, local.text("local.log")[-5000:]
    for table in TABLES:
        ours = (place.folder / "results/smoke/tables" / table).read_bytes()
        assert ours == (local.folder / "results/smoke/tables" / table).read_bytes(), table
        print(f"{table}: {len(ours)} bytes, equal to the local run's")
