"""What the profile asks a real Slurm for: a GPU study with verbs that only touch their outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.slurm.conftest import Workplace, put_study, stub_study
from tests.slurm.local_slurm import ACCOUNT, PARTITION, LocalSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_whole_nodes_and_single_gpus_are_asked_for(
    root: Path, any_slurm: LocalSlurm, tmp_path: Path
) -> None:
    slurm = any_slurm
    place = Workplace(root, tmp_path, slurm, stub=True)
    put_study(tmp_path, stub_study(root))
    place.fault("fail", "--scheme fp16 --task ppl")  # its second attempt asks for more
    run = place.start(place.on_slurm("-j", "8", "--", "accuracy", "performance"), "run.log")
    assert run.wait(timeout=900) == 0, place.text("run.log")

    found = slurm.jobs().values()
    jobs = {
        f["Comment"].removeprefix("rule_").split("_")[0]: f
        for f in found
        if f["JobState"] == "COMPLETED" and "_fp16_" not in f["Comment"]
    }
    assert set(jobs) == {"calibrate", "quantize", "evaluate", "throughput"}
    keys = ("Partition", "Account", "NumNodes", "NumCPUs", "MinMemoryNode", "TresPerJob")
    for rule, fields in jobs.items():
        shown = " ".join(f"{k}={fields.get(k)}" for k in (*keys, "TimeLimit", "NodeList"))
        print(f"scontrol show job {fields['JobId']} ({rule}): {shown}")
        assert (fields["Partition"], fields["Account"]) == (PARTITION, ACCOUNT)
        assert fields["NumNodes"] == "1"
        assert fields["Requeue"] == "0"
    full = jobs["throughput"]
    assert full["TresPerJob"] == "gres:gpu:a100:8"
    assert full["MinMemoryNode"] == "1000G"
    assert full["NumCPUs"] == "128"
    for rule, limit in (("evaluate", "01:15:00"), ("calibrate", "02:00:00")):
        assert jobs[rule]["TresPerJob"] == "gres:gpu:a100:1"
        assert jobs[rule]["MinMemoryNode"] == "125G"
        assert jobs[rule]["TimeLimit"] == limit
    assert "TresPerJob" not in jobs["quantize"], "building codebooks needs no GPU"

    tries = [f for f in found if f["Comment"] == "rule_evaluate_wildcards_llama_fp16_ppl"]
    tries.sort(key=lambda f: int(f["JobId"]))
    grown = [(f["JobState"], f["MinMemoryNode"], f["TimeLimit"]) for f in tries]
    print("evaluate, attempt by attempt:", grown)
    assert grown == [("FAILED", "125G", "01:15:00"), ("COMPLETED", "250G", "02:30:00")]

    submitted = re.findall(r"submitted with SLURM jobid (\d+)", place.text("run.log"))
    assert len(submitted) == len(set(submitted)) == 6  # evaluate twice, and once more
    logs = [p for p in (tmp_path / "logs/slurm").rglob("*.log")]
    assert {p.stem for p in logs} == set(submitted)
    assert not any("fetch" in fields["Comment"] for fields in found)

    if not slurm.accounting:
        return
    columns = "JobID,Partition,Account,Comment%45,State,ReqTRES%75,Timelimit,NodeList"
    listed = slurm("sacct", "-X", "-P", "-o", columns)
    print(listed)
    row = next(r for r in listed.splitlines() if "rule_throughput" in r and "COMPLETED" in r)
    assert f"|{PARTITION}|{ACCOUNT}|" in row
    for part in ("cpu=128", "gres/gpu:a100=8", "mem=1000G", "node=1"):
        assert part in row
