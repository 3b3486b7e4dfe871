"""The default study from its published records: no job measures them again, wherever it runs."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from kvquant.study.config import load_study
from kvquant.study.digests import quantizer_digest
from tests.support.quantizers import save_random_quantizer
from tests.support.snakemakes import run_snakemake

NVML = """
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return "GPU-a1"
def nvmlDeviceGetName(handle): return {name!r}
def nvmlSystemGetDriverVersion(): return "580.1"
"""
MEASURING = {"fetch_model", "calibrate", "quantize", "prompts", "evaluate", "throughput", "energy"}
MEASURING |= {"append_cost", "kernel_case"}


def planned(
    root: Path, tmp_path: Path, *args: str, gpu: str | None = None, config: str = ""
) -> tuple[set[str], str]:
    """The rules of a dry run's jobs and its output, on a machine with such a GPU or none."""
    code = NVML.format(name=gpu) if gpu else "def nvmlInit(): raise OSError('no driver')\n"
    (tmp_path / "pynvml.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    folders = {name: f"{tmp_path}/{name[0]}" for name in ("results", "paper", "logs", "cache")}
    words = ["--nolock", "-n", *args, "--config", f"pathvars={folders}", *config.split()]
    done = run_snakemake(words, root, env)
    output = done.stdout + done.stderr
    assert done.returncode == 0 or "Traceback" not in output
    return set(re.findall(r"^(\w+) +\d+$", output, re.M)), output


def test_without_a_gpu_everything_is_made_from_published_records(
    root: Path, tmp_path: Path
) -> None:
    figure = f"{tmp_path}/p/figures/pareto.pdf"
    rules, output = planned(root, tmp_path, figure)
    assert rules == {"aggregate", "statistics", "pareto", "plot", "total"}, output[-2000:]
    line = next(line for line in output.splitlines() if line.startswith("Of "))
    assert "are published in results/published/h100" in line
    assert line.partition("; ")[0].endswith("missing and left out: this machine has no GPU")
    rules, _ = planned(root, tmp_path)
    assert {"claims", "tables", "html", "report_page"} <= rules and not rules & MEASURING


@pytest.mark.parametrize(
    ("gpu", "options", "config", "expected", "timed"),
    [
        ("NVIDIA H100 80GB HBM3", [], "", True, True),
        ("NVIDIA H200", [], "", False, False),
        # the model itself was timed on an H200, and kernels of nuq on an H100
        ("NVIDIA H200", [], "device=h200", True, False),
        ("NVIDIA H200", [], "device=auto", True, False),
        (None, ["--executor", "slurm", "-j", "64"], "", True, True),
        (None, [], "published=null", True, True),
    ],
)
def test_what_is_missing_is_measured_where_the_device_is(
    root: Path,
    tmp_path: Path,
    gpu: str | None,
    options: list[str],
    config: str,
    expected: bool,
    timed: bool,
) -> None:
    rules, output = planned(root, tmp_path, "aggregate", *options, gpu=gpu, config=config)
    assert ("evaluate" in rules) is expected, output[-2000:]
    assert [rule in rules for rule in ("throughput", "energy")] == [timed, timed], output[-2000:]
    if not expected:
        assert not rules & MEASURING
        assert "this machine's GPU is h200, not h100-80gb-hbm3; --config device=h200" in output
    assert ("kernel_case" in rules) is expected  # those of allocated codes are of an H200


@pytest.mark.fault(
    "workflow",
    "a number edited in the published records of a clone",
    "refused before any job, file, line and record named",
)
def test_an_edited_number_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "results/published/quality", tmp_path / "archive")
    file = tmp_path / "archive/eval/smollm2-135m/fp16.jsonl"
    text = file.read_text()
    file.write_text(text.replace('"value": 21.', '"value": 20.', 1))
    config = ["--configfile", "config/quality.yaml", "--replace-workflow-config"]
    edited = f"published={tmp_path}/archive"
    _, output = planned(root, tmp_path, "aggregate", *config, config=edited)
    assert f"{file}:1: eval/smollm2-135m/fp16/ppl-wikitext2-b/seed0/run.json: " in output
    assert "was changed after it was written" in output and "Traceback" not in output
    file.write_text(text)
    rules, output = planned(root, tmp_path, "aggregate", *config, config=edited)
    assert rules == {"aggregate", "total"}, output


def test_a_published_quantizer_is_not_built_again(root: Path, tmp_path: Path) -> None:
    """Another calibration would differ in the last bits from that of the published records."""
    study, name = load_study(root / "config/config.yaml"), "allocated-3"
    digest = quantizer_digest(study, "smollm2-135m", name)
    folder = tmp_path / f"archive/quantizers/smollm2-135m/{name}"
    save_random_quantizer(folder, "smollm2-135m", name, digest)
    target = f"{tmp_path}/r/eval/smollm2-135m/{name}/ppl-wikitext2-b/seed0/run.json"
    gpu = "NVIDIA H100 80GB HBM3"
    config = f"published={tmp_path}/archive"
    rules, output = planned(root, tmp_path, target, gpu=gpu, config=config)
    assert "evaluate" in rules and not rules & {"calibrate", "quantize"}, output[-2000:]
    shutil.rmtree(folder)
    save_random_quantizer(folder, "smollm2-135m", name, "f" * 16)  # of another study
    rules, output = planned(root, tmp_path, target, gpu=gpu, config=config)
    assert {"evaluate", "calibrate", "quantize"} <= rules, output[-2000:]
