"""The environment in which a number was measured, recorded in every result."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvquant.energy.gpus import (
    Gpu,
    by_uuid,
    cuda_index,
    gpu_of,
    load_nvml,
    short_name,
    visible_gpus,
    visible_uuids,
)

if TYPE_CHECKING:
    import torch

_FILE = Path(__file__).resolve()
_PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "lm-eval", "snakemake", "kvquant"),
    *("optimum-quanto", "hqq"),
)


def _git(*args: str) -> str | None:
    root = _FILE.parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _seen(nvml: Any) -> list[Gpu]:
    """Returns the GPUs of this process: those of torch once it uses any, else by the environment.

    Asking torch earlier would make it allocate GPU memory.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        uuids = visible_uuids()
        if uuids is not None:
            return [by_uuid(nvml, uuid) for uuid in uuids]
    return visible_gpus(nvml)


def _gpus(devices: Sequence[torch.device] | None = None) -> list[dict[str, Any]]:
    """Returns name, memory and driver of GPUs.

    Args:
        devices: The devices that were used; None takes all that this process sees.
    """
    on_gpu = [device for device in devices or () if device.type == "cuda"]
    if devices is not None and not on_gpu:
        return []
    try:
        nvml = load_nvml()
        found = _seen(nvml) if devices is None else [gpu_of(nvml, device) for device in on_gpu]
        driver = nvml.nvmlSystemGetDriverVersion()
    except Exception:  # no driver or library: a CPU machine, or torch describes its devices
        return [_by_torch(device) for device in on_gpu]
    return [
        {"name": gpu.name, "memory_bytes": _memory(nvml, gpu), "driver": driver} for gpu in found
    ]


def _memory(nvml: Any, gpu: Gpu) -> int | None:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(gpu.handle).total)
    except Exception:  # GPUs that share the CPU's memory do not report it
        return None


def _by_torch(device: torch.device) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(cuda_index(device))
    return {"name": found.name, "memory_bytes": int(found.total_memory), "driver": None}


def device_name(device: torch.device | None = None) -> str:
    """Returns the kebab-case name of a GPU, or "cpu" without one.

    For example, "NVIDIA H100 80GB HBM3" gives "h100-80gb-hbm3". The name of a MIG slice contains
    its profile, as in "a100-sxm4-40gb-mig-3g-20gb".

    Args:
        device: The torch device of the work. None takes the first GPU that CUDA will see by
            CUDA_VISIBLE_DEVICES, without importing torch or starting CUDA.
    """
    if device is None:
        gpus = _gpus()
        return short_name(str(gpus[0]["name"])) if gpus else "cpu"
    if device.type != "cuda":
        return "cpu"
    try:
        return short_name(gpu_of(load_nvml(), device).name)
    except Exception:  # without NVML, torch knows the name of its device
        return short_name(str(_by_torch(device)["name"]))


def environment(devices: Sequence[torch.device] | None = None) -> dict[str, Any]:
    """Returns versions, hardware and the state of the source tree, without host names or paths.

    Args:
        devices: The devices that were used, whose GPUs are listed; None lists all that this
            process sees.
    """
    return {**_software(), "gpus": _gpus(devices), "slurm_job": os.environ.get("SLURM_JOB_ID")}


def _commit() -> str | None:
    """Returns the commit of the source tree, or None where git does not know this file.

    An installed package may lie in the environment of another project, whose commit says nothing.
    """
    known = _git("ls-files", "--error-unmatch", "--", str(_FILE))
    return None if known is None else _git("rev-parse", "HEAD")


@functools.cache
def _software() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # A copy of the tree on another machine may lack its history, so a variable can name the commit.
    given = os.environ.get("KVQUANT_COMMIT")
    commit = given or _commit()
    changes = None if given or not commit else _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": versions,
    }
