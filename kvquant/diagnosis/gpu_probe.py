"""Looks at torch, GPUs and what drives them, in a process of its own that a driver may bring down.

Each step prints a line of JSON before and after it, so that the parent
(:mod:`kvquant.diagnosis.gpu_checks`) knows at which one the process ended.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

from kvquant.diagnosis.checks import Check, Found, first_line, look

_TRIVIAL = b'extern "C" __global__ void one(int* x) { *x = 1; }'
NOT_HERE = "needed on a GPU alone"


def _torch() -> Found:
    try:
        import torch
    except (ImportError, OSError) as error:  # the second: a library of it cannot be loaded
        return "missing", first_line(error), "pip install --force-reinstall 'torch>=2.9,<3'"
    version = torch.__version__
    if torch.version.cuda is not None:
        return "ok", f"{version}, built for CUDA {torch.version.cuda}", ""
    fix = "for a GPU of NVIDIA, install a CUDA build of torch (pip install torch)"
    return "warning", f"{version}, a build without CUDA", fix


def _gpus() -> Found:
    import torch

    if not torch.cuda.is_available():
        told = "torch sees none: everything runs on the CPU"
        return "warning", told, "check nvidia-smi and CUDA_VISIBLE_DEVICES, if there is one"
    described = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        assert int((torch.ones(1, device=f"cuda:{index}") + 1).item()) == 2
        described.append(
            f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, capability "
            f"{facts.major}.{facts.minor}"
        )
    kinds = dict.fromkeys(described)
    return "ok", "; ".join(f"{described.count(kind)} x {kind}" for kind in kinds), ""


def _driver() -> Found:
    from kvquant.energy.gpus import load_nvml, visible_gpus

    try:
        nvml = load_nvml()
        version = nvml.nvmlSystemGetDriverVersion()
        count = len(visible_gpus(nvml))
    except Exception as error:  # NVML's own types
        return "warning", f"NVML does not answer ({error})", "on a GPU, check nvidia-smi"
    return "ok", f"{version}, {count} GPU(s) visible", ""


def _nvrtc() -> Found:
    import torch

    on_gpu = torch.cuda.is_available()
    fix = "install a CUDA build of torch, which brings cuda-bindings and NVRTC"
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        if not on_gpu:
            return "skipped", f"cuda-bindings is not installed; {NOT_HERE}", ""
        return "missing", f"cuda-bindings: {error}; kernels run in Triton or PyTorch", fix
    major, minor = torch.cuda.get_device_capability() if on_gpu else (8, 0)
    try:
        _, hi, lo = nvrtc.nvrtcVersion()
        _, program = nvrtc.nvrtcCreateProgram(_TRIVIAL, b"one.cu", 0, [], [])
        flags = [f"--gpu-architecture=sm_{major}{minor}".encode()]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    except RuntimeError as error:  # the library itself is missing
        told = str(error).splitlines()[0]
        return ("missing", told, fix) if on_gpu else ("skipped", f"{told}; {NOT_HERE}", "")
    if int(status):
        return "missing", f"NVRTC {hi}.{lo} does not compile for sm_{major}{minor}: {status}", fix
    return "ok", f"{hi}.{lo} compiles for sm_{major}{minor}", ""


def _triton() -> Found:
    import torch

    if not torch.cuda.is_available():
        return "skipped", NOT_HERE, ""
    try:
        import triton
    except ImportError as error:
        return "warning", f"not installed ({error}); PyTorch takes its place", "pip install triton"
    target: Any = triton.runtime.driver.active.get_current_target()
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    found = f"{triton.__version__}, target {target.backend}:{target.arch}"
    if compiler is None:
        return "warning", f"{found}, no C compiler, which it needs", "apt-get install gcc"
    return "ok", f"{found}, C compiler {os.path.basename(compiler)}", ""


def _energy() -> Found:
    import torch

    from kvquant.energy.monitor import open_meter

    meter = open_meter("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if meter.source == "estimated":
            return "warning", meter.method, "no claim rests on it; energy needs counters"
        if "counter" in meter.method:
            return "ok", meter.method, ""
        return "warning", meter.method, "counters are exact; ask for a whole GPU with them"
    finally:
        meter.close()


# In this order; the first one is needed by everything.
STEPS: dict[str, Callable[[], Found]] = {
    "torch": _torch,
    "driver": _driver,
    "GPU": _gpus,
    "NVRTC": _nvrtc,
    "Triton": _triton,
    "energy": _energy,
}


def run_steps(out: Callable[[dict[str, Any]], None]) -> None:
    """Runs all steps.

    Args:
        out: Gets `{"begins": NAME}` before, and the check's JSON after each step.
    """
    for name, step in STEPS.items():
        out({"begins": name})
        check: Check = look("GPU" if name != "torch" else "software", name, step)
        out(check.as_json())


def main() -> None:
    """Runs all steps and prints their lines."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no JSON

    def out(line: dict[str, Any]) -> None:
        stream.write(json.dumps(line) + "\n")
        stream.flush()

    run_steps(out)


if __name__ == "__main__":
    main()
