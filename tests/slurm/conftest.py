"""A local Slurm for the module, a tiny study, and Snakemake on both."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import tiny_model
from tests.slurm.local_slurm import PARTITION, LocalSlurm, reason_to_skip
from tests.test_pipeline import TEXT, save_tokenizer

# Stands before the real interpreter in PATH. A verb whose name and words match a file in faults/
# hangs instead of working, once: the retry finds the file gone.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m kvquant" ]; then
  for fault in {work}/faults/*; do
    [ -e "$fault" ] || continue
    case " $* " in
      *" $3 "*"$(cat "$fault")"*) rm "$fault" && exec sleep 600 ;;
    esac
  done
  {stub}
fi
exec {python} "$@"
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """Two nodes of 128 CPUs, 1 TiB and 8 GPUs each, all of them claimed, none of them real."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    # not pytest's folder: a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="kvquant-slurm.") as folder:
        running = LocalSlurm(Path(folder))
        yield running
        running.stop()


class Workplace:
    """A folder with a study in which Snakemake runs on the local Slurm or without it."""

    def __init__(self, root: Path, folder: Path, slurm: LocalSlurm, stub: bool = False) -> None:
        self.root, self.folder, self.slurm = root, folder, slurm
        python = folder / "bin/python"
        python.parent.mkdir(parents=True)
        (folder / "faults").mkdir()
        file = root / "tests/workflow/stub_verbs.py"
        run = f'shift 2; exec {sys.executable} {file} "$@"' if stub else ":"
        python.write_text(PYTHON.format(work=folder, python=sys.executable, stub=run))
        python.chmod(0o755)
        self.env = {
            **slurm.env,
            "PATH": f"{python.parent}:{slurm.env['PATH']}",
            "PYTHONPATH": str(root),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def fault(self, verb: str, words: str) -> None:
        """The next call of `verb` whose command holds `words` hangs."""
        (self.folder / f"faults/{verb}-{hashlib.sha1(words.encode()).hexdigest()[:8]}").write_text(
            words
        )

    def command(self, *args: str) -> list[str]:
        """Snakemake on this folder's study."""
        words = [sys.executable, "-m", "snakemake", "--snakefile", str(self.root / "Snakefile")]
        words += ["--directory", str(self.folder), "--configfile", str(self.folder / "study.yaml")]
        return [*words, "--replace-workflow-config", *args]

    def on_slurm(self, *args: str) -> list[str]:
        """The same with the profile of the paper's cluster, polling faster than it."""
        profile = self.root / "workflow/profiles/athena"
        resources = [f"slurm_partition={PARTITION}", "slurm_account=grant-gpu-a100", "runtime=60"]
        return [
            *self.command("--profile", str(profile), "--executor", "slurm"),
            *("--slurm-init-seconds-before-status-checks", "8"),
            *("--max-status-checks-per-second", "1", "--latency-wait", "5"),
            *("--default-resources", *resources),
            *args,
        ]

    def start(self, command: list[str], log: str) -> subprocess.Popen[str]:
        """Starts Snakemake with its output in a file of this folder."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.env,
            stdout=(self.folder / log).open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def text(self, log: str) -> str:
        """What a run printed so far."""
        return (self.folder / log).read_text()


def tiny_study(folder: Path) -> dict[str, Any]:
    """The smoke study's shape on a model of two layers, saved in `folder`."""
    model = tiny_model(vocab_size=257, max_position_embeddings=1024, eos_token_id=256)
    model.save_pretrained(folder / "hf")
    save_tokenizer(folder / "hf")
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
    (data / "text.txt").write_text(TEXT)
    manifest = {
        "dataset": "essays",
        "source": "test",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        "characters": len(TEXT),
        "test_from": len(TEXT) // 2,
        "file": "text.txt",
    }
    (data / "manifest.json").write_text(json.dumps(manifest))
    os.utime(data / "manifest.json", (1, 1))
