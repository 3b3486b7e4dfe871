"""A local Slurm for the module, a tiny study, and Snakemake on both."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvquant.study.overlay import read_study
from tests.slurm.local_slurm import (
    ACCOUNT,
    PARTITION,
    LocalSlurm,
    no_accounting,
    reason_to_skip,
)
from tests.support.models import save_byte_model
from tests.support.text import write_corpus

# Stands before the real interpreter in PATH and notes in calls.log what began and ended. A verb
# whose words match a file in faults/ fails, hangs or dawdles, as the file's name says, once: the
# file is then gone. Nodes here have no GPU, so a verb that is told to use one works on the CPU.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m kvquant" ] || exec {python} "$@"
call="${{SLURM_JOB_ID:-local}} $*"
echo "begin $call" >>{work}/calls.log
for fault in {work}/faults/*; do
  [ -e "$fault" ] || continue
  case " $* " in
    *" $(cat "$fault")"*)
      rm "$fault"
      case $fault in
        */fail*) exit 1 ;;
        */hang*) exec sleep 600 ;;
        */slow*) sleep 75 ;;
      esac ;;
  esac
done
# the nodes have no internet
[ -z "${{SLURM_JOB_ID:-}}" ] || export http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9
for word; do
  shift
  [ "$word" != cuda ] || word=cpu
  set -- "$@" "$word"
done
{run} "$@" || exit
echo "end $call" >>{work}/calls.log
"""


def _running(accounting: bool) -> Iterator[LocalSlurm]:
    if reason := reason_to_skip() or (no_accounting() if accounting else None):
        pytest.skip(reason)
    # not pytest's folder: a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="kvquant-slurm.") as folder:
        running = LocalSlurm(Path(folder), accounting)
        yield running
        running.stop()


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    """Two nodes of 128 CPUs, 1 TiB and 8 GPUs each, all of them claimed, none of them real."""
    yield from _running(accounting=False)


@pytest.fixture(scope="module")
def slurm_with_accounting() -> Iterator[LocalSlurm]:
    """The same with slurmdbd, so that `sacct` answers."""
    yield from _running(accounting=True)


@pytest.fixture(scope="module")
def any_slurm() -> Iterator[LocalSlurm]:
    """The same, with slurmdbd where it is installed."""
    yield from _running(accounting=no_accounting() is None)


class Workplace:
    """A folder with a study in which Snakemake runs on the local Slurm or without it."""

    def __init__(self, root: Path, folder: Path, slurm: LocalSlurm, stub: bool = False) -> None:
        self.root, self.folder, self.slurm = root, folder, slurm
        python = folder / "bin/python"
        python.parent.mkdir(parents=True)
        (folder / "faults").mkdir()
        file = root / "tests/workflow/stub_verbs.py"
        run = f"shift 2; {sys.executable} {file}" if stub else sys.executable
        python.write_text(PYTHON.format(work=folder, python=sys.executable, run=run))
        python.chmod(0o755)
        self.env = {
            **slurm.env,
            "PATH": f"{python.parent}:{slurm.env['PATH']}",
            "PYTHONPATH": str(root),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def fault(self, kind: str, words: str) -> None:
        """The next verb whose command holds `words` will `fail`, `hang` or be `slow`, once."""
        name = f"{kind}-{hashlib.sha1(words.encode()).hexdigest()[:8]}"
        (self.folder / "faults" / name).write_text(words)

    def pending_fault(self, kind: str) -> bool:
        """Whether a fault of this kind has not struck yet."""
        return any((self.folder / "faults").glob(f"{kind}-*"))

    def calls(self, what: str) -> list[str]:
        """Commands that began or ended in Slurm jobs, in their order, without the job ids."""
        file = self.folder / "calls.log"
        lines = file.read_text().splitlines() if file.is_file() else []
        words = (line.split(" ", 2) for line in lines)
        return [call for event, job, call in words if event == what and job != "local"]

    def command(self, *args: str) -> list[str]:
        """Snakemake on this folder's study."""
        words = [sys.executable, "-m", "snakemake", "--snakefile", str(self.root / "Snakefile")]
        words += ["--directory", str(self.folder), "--configfile", str(self.folder / "study.yaml")]
        return [*words, "--replace-workflow-config", *args]

    def on_slurm(
        self, *args: str, profile: Path | None = None, partition: str = PARTITION
    ) -> list[str]:
        """The same with a profile of a cluster (Athena's), polling faster than it."""
        folder = profile or self.root / "workflow/profiles/athena"
        resources = [f"slurm_partition={partition}", f"slurm_account={ACCOUNT}", "runtime=60"]
        return [
            *self.command("--profile", str(folder)),
            *("--slurm-init-seconds-before-status-checks", "8"),
            *("--max-status-checks-per-second", "1", "--latency-wait", "5"),
            *("--default-resources", *resources),
            *args,
        ]

    def start(self, command: list[str], log: str) -> subprocess.Popen[str]:
        """Starts Snakemake with its output in a file of this folder."""
        started = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.env,
            stdout=(self.folder / log).open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.slurm.clients.append(started)
        return started

    def text(self, log: str) -> str:
        """What a run printed so far."""
        return (self.folder / log).read_text()


def stub_study(root: Path) -> dict[str, Any]:
    """The cluster's study with one model and few jobs, for verbs that only touch their outputs."""
    study: dict[str, Any] = read_study(root / "config/athena.yaml")
    study["models"] = {"llama": study["models"]["llama-2-7b-32k"]}
    study["schemes"] = {name: study["schemes"][name] for name in ("fp16", "nuq3-1pct")}
    study["tasks"] = {"ppl": {**study["tasks"]["ppl-wikitext2-b"], "dataset": "essays"}}
    study["throughput"] = {**study["throughput"], "reps": 1, "schemes": []}
    study["throughput"]["workloads"] = {"p16384-b1": {"prompt": 16384}}
    study["energy"]["workloads"] = {}
    study["energy"]["schemes"] = []
    study["protect"] = False
    study.pop("evaluation")  # names schemes that are left out here
    study.pop("append")
    study.pop("kernels")
    return study


def tiny_study(folder: Path) -> dict[str, Any]:
    """The smoke study's shape on a model of two layers, saved in `folder`."""
    save_byte_model(folder / "hf")
    return {
        "study": "tiny",
        "device": "cpu",
        "seeds": [0, 1],
        "models": {"tiny": {"source": "local", "path": str(folder / "hf"), "gpus": 0}},
        "calibration": {"windows": 2, "window": 128},
        "schemes": {
            "fp16": {"kind": "fp16"},
            "nuq3-1pct": {"kind": "nuq", "bits": 3, "block_size": 32},
            "kivi-2": {"kind": "kivi", "bits": 2, "group": 16, "residual": 16},
        },
        "tasks": {
            "ppl": {
                "suite": "perplexity",
                "dataset": "essays",
                "window": 96,
                "windows": 2,
                "minutes": 30,
            },
            "passkey": {"suite": "passkey", "length": 600, "samples": 2, "batch_size": 2},
        },
        "throughput": {
            "workloads": {"p64": {"prompt": 64, "batch_size": 2, "answer": 2, "ragged": True}},
            "schemes": ["nuq3-1pct"],
            "warmup": 1,
            "iterations": 5,
        },
        "energy": {
            "workloads": {"p32": {"prompt": 32, "answer": 1}},
            "schemes": ["nuq3-1pct"],
            "trials": 1,
            "seconds": 0.1,
            "idle_seconds": 0.1,
        },
        "pathvars": {
            "results": "results/tiny",
            "paper": "results/tiny/paper",
            "logs": "logs/tiny",
        },
    }


def put_study(folder: Path, study: dict[str, Any]) -> None:
    """Writes the study, and its text as `fetch-data` would have left it."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    data = folder / "resources/data/essays"
    data.mkdir(parents=True)
    os.utime(write_corpus(data, "manifest.json"), (1, 1))
