"""The profile for any site: preempted jobs, a lost node and an accounting that is away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.slurm.conftest import Workplace, put_study, stub_study
from tests.slurm.local_slurm import LocalSlurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_preempted_jobs_and_a_lost_node_are_made_up_for(
    root: Path, slurm_with_accounting: LocalSlurm, tmp_path: Path
) -> None:
    slurm = slurm_with_accounting
    study = stub_study(root)
    study["models"]["late"] = study["models"]["llama"]
    study["schemes"] = {"fp16": study["schemes"]["fp16"]}
    study["headline"] = "fp16"
    places = {}
    runs = {}
    for mode in ("cancel", "requeue"):
        folder = tmp_path / mode
        place = places[mode] = Workplace(root, folder, slurm, stub=True)
        put_study(folder, study)
        place.fault("hang", "--model llama --scheme fp16 --task ppl")
        if mode == "cancel":
            # fetched so late that its job is submitted while slurmdbd is away
            place.fault("slow", "fetch-model --study results/paper/study.json --model late")
            place.fault("hang", "--model late --scheme fp16 --task ppl")
        profile = root / "workflow/profiles/slurm"
        if mode == "requeue":  # what docs/cluster.md says about preemptible partitions
            text = (profile / "profile.yaml").read_text()
            assert "\nslurm-no-requeue: true" in text
            profile = folder
            (folder / "profile.yaml").write_text(
                text.replace("\nslurm-no-requeue: true", "\nslurm-requeue: true")
            )
        words = place.on_slurm(
            *("-j", "8", "--", "accuracy"), profile=profile, partition=f"spare-{mode}"
        )
        runs[mode] = place.start(words, "run.log")

    def jobs(mode: str, model: str) -> list[dict[str, str]]:
        comment = f"rule_evaluate_wildcards_{model}_fp16_ppl"
        found = (f for f in slurm.jobs().values() if f.get("Comment") == comment)
        return [f for f in found if f["WorkDir"] == str(tmp_path / mode)]

    def states(mode: str, model: str) -> list[str]:
        return sorted(f["JobState"] for f in jobs(mode, model))

    def hangs(mode: str, model: str) -> bool:
        began = " ".join(places[mode].calls("begin"))
        return f"--model {model} " in began and "RUNNING" in states(mode, model)

    for mode in places:
        until(f"a hanging job in spare-{mode}", lambda mode=mode: hangs(mode, "llama"))  # type: ignore[misc]
    slurm.kill("slurmdbd")
    assert slurm("sbatch", "-p", "urgent", "-N2", "--exclusive", "--mem=0", "--wrap", "sleep 3")
    until("a preempted job", lambda: "PREEMPTED" in states("cancel", "llama"))
    late = places["cancel"].folder / "resources/models/late/manifest.json"
    until("the late model", late.exists)
    time.sleep(15)  # its job would have been refused three times by now
    assert not states("cancel", "late")
    slurm.start_slurmdbd()

    until("the late job", lambda: hangs("cancel", "late"))
    # or it is lost with the node
    until("the preempted job's second attempt", lambda: "COMPLETED" in states("cancel", "llama"))
    lost = jobs("cancel", "late")[0]["NodeList"]
    slurm("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    until("a node failure", lambda: "NODE_FAIL" in states("cancel", "late"))
    slurm("scontrol", "update", f"nodename={lost}", "state=resume")

    for mode, place in places.items():
        assert runs[mode].wait(timeout=900) == 0, place.text("run.log")[-5000:]
        print(f"spare-{mode}:")
        for model in study["models"]:
            for f in jobs(mode, model):
                keys = ("JobId", "JobState", "Restarts", "NodeList", "Comment")
                print("  " + " ".join(f"{k}={f[k]}" for k in keys))
        assert len(set(place.calls("end"))) == len(study["models"])
    assert states("cancel", "llama") == ["COMPLETED", "PREEMPTED"]
    assert states("cancel", "late") == ["COMPLETED", "NODE_FAIL"]
    nodes = {f["NodeList"] for f in jobs("cancel", "late")}
    assert len(nodes) == 2, "the lost node is avoided"
    assert states("requeue", "llama") == states("requeue", "late") == ["COMPLETED"]
    assert jobs("requeue", "llama")[0]["Restarts"] == "1"
    print(slurm("sacct", "-X", "-P", "-D", "-o", "JobID,Partition,Comment%45,State,NodeList"))
