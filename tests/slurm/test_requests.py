"""What the profile asks a real Slurm for: a GPU study with verbs that only touch their outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.slurm.conftest import Workplace, put_study
from tests.slurm.local_slurm import PARTITION, LocalSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_whole_nodes_and_single_gpus_are_asked_for(
    root: Path, slurm: LocalSlurm, tmp_path: Path
) -> None:
    place = Workplace(root, tmp_path, slurm, stub=True)
    study = yaml.safe_load((root / "config/athena.yaml").read_text())
    study["models"] = {"llama": study["models"]["llama-2-7b-32k"]}
    study["schemes"] = {name: study["schemes"][name] for name in ("fp16", "nuq3-1pct")}
    study["tasks"] = {"ppl": {**study["tasks"]["ppl-wikitext2-b"], "dataset": "essays"}}
    study["throughput"] = {**study["throughput"], "reps": 1}
    study["throughput"]["workloads"] = {"p16384-b1": {"prompt": 16384}}
    study["energy"]["workloads"] = {}
    study["energy"]["schemes"] = []
    study["protect"] = False
    put_study(tmp_path, study)
    run = place.start(place.on_slurm("-j", "8", "--", "accuracy", "performance"), "run.log")
    assert run.wait(timeout=240) == 0, place.text("run.log")

    jobs = {fields["Comment"].split("_")[1]: fields for fields in slurm.jobs().values()}
    assert set(jobs) == {"calibrate", "quantize", "evaluate", "throughput"}
    keys = ("Partition", "Account", "NumNodes", "NumCPUs", "MinMemoryNode", "TresPerJob")
    for rule, fields in jobs.items():
        shown = " ".join(f"{k}={fields.get(k)}" for k in (*keys, "TimeLimit", "NodeList"))
        print(f"scontrol show job {fields['JobId']} ({rule}): {shown}")
        assert fields["JobState"] == "COMPLETED"
        assert (fields["Partition"], fields["Account"]) == (PARTITION, "grant-gpu-a100")
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

    submitted = re.findall(r"submitted with SLURM jobid (\d+)", place.text("run.log"))
    assert len(submitted) == len(set(submitted)) == 5  # evaluate twice
    logs = [p for p in (tmp_path / "logs/slurm").rglob("*.log")]
    assert {p.stem for p in logs} == set(submitted)
    assert not any("fetch" in fields["Comment"] for fields in slurm.jobs().values())
