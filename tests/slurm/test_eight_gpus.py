"""A job that asks Slurm for the eight GPUs of a node, and the processes that it starts there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvquant.study.records import JobRecord, read_record
from tests.slurm.conftest import Workplace, put_study, tiny_study
from tests.slurm.local_slurm import LocalSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_case_of_eight_gpus_by_heads(root: Path, any_slurm: LocalSlurm, tmp_path: Path) -> None:
    """The GPUs are counted, not real: each of the eight processes works on the CPU."""
    slurm, study = any_slurm, tiny_study(tmp_path)
    case: dict[str, Any] = {
        "shape": "tiny-gqa", "gpus": 8, "split": "heads", "prompt": 64, "answer": 2,
        "batch_size": 1, "trials": 1, "schemes": ["fp16", "nuq3-1pct"],
    }  # fmt: skip
    study |= {"gpus": 1, "jobs": {"cases": {"heads": case}, "minutes": 90}}
    place = Workplace(root, tmp_path, slurm)
    put_study(tmp_path, study)
    run = place.start(place.on_slurm("-j", "2", "--", "jobs"), "run.log")
    assert run.wait(timeout=900) == 0, place.text("run.log")
    (job,) = slurm.jobs().values()
    assert job["JobState"] == "COMPLETED"
    assert job["TresPerJob"] == "gres:gpu:a100:8"
    assert (job["NumNodes"], job["NumTasks"]) == ("1", "1")  # which starts the eight itself
    assert (job["MinMemoryNode"], job["TimeLimit"]) == ("125G", "01:30:00")
    record = read_record(tmp_path / "results/tiny/jobs/cpu/heads.json", JobRecord)
    assert (record.gpus, record.split) == (8, "heads")
    for side in record.sides:
        assert side.cache_elements == 2 * 2 * 64 * 8 * 32  # of all eight, with one head each
    assert record.environment["slurm_job"] == job["JobId"]
