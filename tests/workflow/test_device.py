"""The device that results lie under, planned on hosts of several GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.snakemakes import run_snakemake

# NVML of a host of two GPUs, found by Snakemake in place of the real one.
NVML = """
NAMES = {"GPU-a1": "NVIDIA GeForce RTX 3090", "GPU-b2": "NVIDIA A100-SXM4-40GB"}
def nvmlInit(): pass
def nvmlDeviceGetCount(): return len(NAMES)
def nvmlDeviceGetHandleByIndex(index): return list(NAMES)[index]
def nvmlDeviceGetUUID(handle): return handle
def nvmlDeviceGetName(handle): return NAMES[handle]
def nvmlSystemGetDriverVersion(): return "580.1"
"""


@pytest.mark.parametrize(
    ("gpus", "visible", "device"),
    [
        (1, "GPU-b2", "a100-sxm4-40gb"),
        (0, "1", "cpu"),  # a study on the processor, also where there is a GPU
    ],
)
def test_results_are_planned_under_the_gpu_that_will_work(
    root: Path, tmp_path: Path, gpus: int, visible: str, device: str
) -> None:
    (tmp_path / "pynvml.py").write_text(NVML)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "CUDA_VISIBLE_DEVICES": visible}
    folders = {name: f"{tmp_path}/{name}" for name in ("results", "paper", "logs", "cache")}
    words = ["--nolock", "-n", "joules", "--configfile", "config/smoke.yaml"]
    words += ["--replace-workflow-config", "--config"]
    words += ["device=auto", f"gpus={gpus}", f"pathvars={folders}"]
    done = run_snakemake(words, root, env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"results/energy/{device}/" in done.stdout
