"""The profiles: which study they run, and what a person reads in a dry run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvquant.study.config import parse_study
from kvquant.study.overlay import read_study
from tests.support.snakemakes import run_snakemake


def profiles(root: Path) -> dict[str, dict[str, Any]]:
    """{name: content} of every profile."""
    files = sorted((root / "workflow/profiles").glob("*/profile.yaml"))
    return {f.parent.name: yaml.safe_load(f.read_text()) for f in files}


def test_profiles_name_existing_studies_and_replace_the_default(root: Path) -> None:
    found = profiles(root)
    assert set(found) >= {"demo", "smoke", "gpu1", "athena", "slurm"}
    for name, content in found.items():
        assert content["replace-workflow-config"] is True, name
        assert "keep-incomplete" not in content, "a truncated output would be taken for whole"
        assert content["rerun-incomplete"] is True, name
        if name not in ("slurm", "cpu"):  # these are for any study
            assert (root / content["configfile"]).is_file()


def test_slurm_profiles_avoid_known_faults(root: Path) -> None:
    for content in (profiles(root)[name] for name in ("athena", "slurm")):
        assert content["slurm-status-command"] == "squeue"
        assert content["slurm-no-requeue"] is True
        assert Path(content["slurm-logdir"]) != Path("logs")
        assert content["retries"] > 0
        assert not any("array" in key or key == "groups" for key in content)
        assert content["nolock"] is True, "a killed run would need --unlock"
    athena = profiles(root)["athena"]
    # the GPU's type belongs to GPU rules only: as a default, quantize would ask for a GPU
    assert not any(line.startswith(("gpu", "gres")) for line in athena["default-resources"])
    for rule in ("calibrate", "evaluate", "throughput", "energy", "append_cost", "kernel_case"):
        assert athena["set-resources"][rule] == {"gpu_model": "a100"}


def test_a_shared_gpu_is_not_shared_by_what_is_timed(root: Path) -> None:
    shared = profiles(root)["gpu1-shared"]
    places = int(shared["resources"][0].removeprefix("gpu="))
    assert places > 1
    for rule in ("throughput", "energy", "append_cost", "kernel_case"):
        assert shared["set-resources"][rule]["gpu"] > places  # capped to all of them
    assert "evaluate" not in shared["set-resources"]
    single = profiles(root)["gpu1"]
    assert single["resources"] == ["gpu=1"]
    assert single["configfile"] == shared["configfile"]


@pytest.mark.slow
def test_dry_run_of_the_demo_is_readable(root: Path) -> None:
    done = run_snakemake(
        ["-n", "--nolock", "--forceall", "--profile", "workflow/profiles/demo"], root
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    lines = output.splitlines()
    assert len(lines) < 150
    assert max(map(len, lines)) < 240  # the longest one names every rule
    assert "Evaluating nuq3-1pct on all tasks (smollm2-135m)" in output
    assert not any(line.lstrip().startswith(("input:", "output:", "Host:")) for line in lines)


@pytest.mark.slow
def test_more_than_a_thousand_jobs_are_planned(root: Path, tmp_path: Path) -> None:
    study = read_study(root / "config/athena.yaml")
    passkey = study["tasks"]["passkey-2k"]
    study["tasks"].update({f"passkey-{n}": {**passkey, "length": 1024 + n} for n in range(30)})
    study["pathvars"] = {"results": f"{tmp_path}/r", "paper": f"{tmp_path}/p"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    words = ["-n", "--quiet", "rules", "--executor", "slurm", "--replace-workflow-config"]
    words += ["--profile", "workflow/profiles/athena"]
    done = run_snakemake([*words, "--configfile", tmp_path / "study.yaml"], root)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-2000:]
    planned = dict(re.findall(r"^(\w+) +(\d+)$", output, re.M))
    spec = parse_study(study)
    expected = len(spec.models) * len(spec.eval_cells())
    assert int(planned["evaluate"]) == expected > 1000
