"""The environment in which a number was measured, recorded in every result."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvquant.energy.nvml import gpu_handles, visible_uuids

_PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "lm-eval", "snakemake", "kvquant"),
    *("optimum-quanto", "hqq"),
)


def _git(*args: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpus() -> list[dict[str, Any]]:
    """Name, memory and driver of the GPUs of this process, or of all before it uses any.

    Empty without NVML.
    """
    torch = sys.modules.get("torch")
    try:
        import pynvml

        # asking torch for its GPUs would make it take memory of them
        uses = torch is not None and torch.cuda.is_initialized()
        handles = gpu_handles(pynvml, visible_uuids() if uses else None)
    except Exception:  # no driver, no library or no GPU: a CPU machine
        return []
    driver = pynvml.nvmlSystemGetDriverVersion()
    return [
        {
            "name": pynvml.nvmlDeviceGetName(handle),
            "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            "driver": driver,
        }
        for handle in handles
    ]


def device_name() -> str:
    """The kebab-case name of the first GPU, or 'cpu' without one.

    Example: "NVIDIA H100 80GB HBM3" gives "h100-80gb-hbm3".
    """
    gpus = _gpus()
    if not gpus:
        return "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", str(gpus[0]["name"]).lower()).strip("-")
    return name.removeprefix("nvidia-")


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, hardware and the state of the source tree (no host names, no paths)."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # A copy of the tree on another machine may have no history, or an older one: then it is told.
    told = os.environ.get("KVQUANT_COMMIT")
    commit = told or _git("rev-parse", "HEAD")
    changes = None if told or not commit else _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": versions,
        "gpus": _gpus(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
