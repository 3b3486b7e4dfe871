"""The profiles: which study they run, and what a person reads in a dry run."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvquant.study.config import parse_study
from kvquant.study.grid import request
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


# Stands before the interpreter, notes how many verbs on GPUs run with it, and dawdles.
COUNTING = """#!/bin/sh
[ "$1 $2" = "-m kvquant" ] || exec {python} "$@"
shift 2
case $1 in fetch*) exec {python} {stub} "$@" ;; esac
touch running/$$
sleep 3
echo "$1 $(ls running | wc -l)" >> seen.log
{python} {stub} "$@"
status=$?
rm running/$$
exit $status
"""


@pytest.mark.slow
def test_a_node_of_eight_gpus_is_filled(root: Path, tmp_path: Path) -> None:
    """By 64 places: evaluations of a small model run side by side, and what is timed alone."""
    stub = tmp_path / "bin/python"
    stub.parent.mkdir()
    (tmp_path / "running").mkdir()
    verbs = root / "tests/workflow/stub_verbs.py"
    stub.write_text(COUNTING.format(python=sys.executable, stub=verbs))
    stub.chmod(0o755)
    task = {"suite": "perplexity", "dataset": "essays", "window": 64}
    case = {"shape": "70b-gqa", "gpus": 8, "split": "heads", "prompt": 64, "answer": 2}
    study = {
        "study": "node",
        "device": "cpu",
        "gpus": 1,
        "models": {"tiny": {"source": "local", "path": str(tmp_path), "gpus": 1}},
        "schemes": {"fp16": {"kind": "fp16"}, "kivi-4": {"kind": "kivi", "bits": 4}},
        "headline": "kivi-4",
        "tasks": {f"ppl-{n}": task | {"windows": n} for n in range(1, 11)},
        "jobs": {"cases": {"heads": case | {"schemes": ["fp16"]}}},
        "pathvars": {"results": "results", "paper": "paper", "logs": "logs"},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    words: list[str | Path] = ["--profile", root / "workflow/profiles/gpu1-shared"]
    words += [
        "--resources",
        "gpu=64",
        "--snakefile",
        root / "Snakefile",
        "--directory",
        tmp_path,
        "--cores",
        "64",
    ]
    words += ["--configfile", tmp_path / "study.yaml", "--replace-workflow-config"]
    folders = [str(stub.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    env = {**os.environ, "PATH": os.pathsep.join(folders), "PYTHONPATH": str(root)}
    done = run_snakemake([*words, "--", "accuracy", "jobs"], tmp_path, env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    seen: dict[str, list[int]] = {}
    for line in (tmp_path / "seen.log").read_text().splitlines():
        verb, running = line.split()
        seen.setdefault(verb, []).append(int(running))
    assert len(seen["evaluate"]) == 20
    assert max(seen["evaluate"]) > 16  # two GPUs would have taken that many
    assert seen["bench"] == [1]


@pytest.mark.slow
def test_a_study_of_eight_gpus_asks_for_them(root: Path) -> None:
    """On Slurm, of its own node; the model of the accuracy is spread over all, too."""
    for name, device in (("eight_gpus", "a100-sxm4-40gb"), ("eight_gpus_80gb", "h100-80gb-hbm3")):
        words = ["-n", "--profile", "workflow/profiles/athena", "--replace-workflow-config"]
        words += ["--configfile", f"config/{name}.yaml", "--quiet", "host", "reason"]
        done = run_snakemake([*words, "--", "jobs", "accuracy"], root)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-2000:]
        study = parse_study(read_study(root / f"config/{name}.yaml"))
        for case in study.job_cases():
            assert f"Whole jobs, {case}, on {device}" in output
            assert request(study, "job_case", None, case=case).gpus == 8
        assert request(study, "evaluate", "smollm2-135m", "ppl-wikitext2-b").gpus == 8


@pytest.mark.slow
def test_a_tenth_of_the_accuracies_is_measured_again(root: Path) -> None:
    words = ["-n", "--profile", "workflow/profiles/athena", "--replace-workflow-config"]
    words += ["--configfile", "config/accuracy_tenth.yaml", "--quiet", "rules"]
    done = run_snakemake([*words, "--config", "device=a100-sxm4-40gb", "--", "reproduce"], root)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-2000:]
    planned = dict(re.findall(r"^(\w+) +(\d+)$", output, re.M))
    study = parse_study(read_study(root / "config/config.yaml"))
    assert int(planned["evaluate"]) == 54
    assert "calibrate" not in planned  # with the published quantizers
    assert 0.09 < 54 / len(study.eval_cells()) < 0.11


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
