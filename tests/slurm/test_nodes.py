"""The profile for any site: preempted jobs, a lost node and an accounting that is away."""

from __future__ import annotations

import threading
import time
from collections import Counter
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
    study["schemes"] = {n: s for n, s in study["schemes"].items() if n == "fp16"}
    study["headline"] = "fp16"
    study["throughput"]["schemes"] = []
    places = {}
    for mode in ("cancel", "requeue"):
        place = places[mode] = Workplace(root, tmp_path / mode, slurm, stub=True)
        put_study(tmp_path / mode, study)
        place.fault("hang", "--model llama --scheme fp16 --task ppl")
    # fetched later, so that its job is submitted while slurmdbd is away
    places["cancel"].fault("slow", "fetch-model --study results/paper/study.json --model late")

    def start(mode: str, *options: str) -> None:
        command = places[mode].on_slurm(
            *("-j", "8", *options, "--", "accuracy"), profile="slurm", partition=f"spare-{mode}"
        )
        runs[mode] = places[mode].start(command, "run.log")

    runs: dict[str, object] = {}
    start("cancel")
    start("requeue", "--slurm-requeue")
    for place in places.values():
        until("a hanging job", lambda place=place: not place.pending_fault("hang"), 120)  # type: ignore[misc]

    def state(mode: str, model: str = "llama") -> Counter[str]:
        comment = f"rule_evaluate_wildcards_{model}_fp16_ppl"
        folder = str(tmp_path / mode)
        return Counter(
            f["JobState"]
            for f in slurm.jobs().values()
            if (f["Comment"], f["WorkDir"]) == (comment, folder)
        )
