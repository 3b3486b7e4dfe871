"""A study of a tiny saved model, taken through the verbs as the workflow does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvquant.cli import main
from tests.support.models import save_byte_model
from tests.support.text import write_corpus


def measured_folder(folder: Path) -> Path:
    """Fills a folder with a saved model, a text and a study, and runs the shared stages.

    Afterwards it holds the manifests of model and text, the statistics of calibration, the
    quantizers of `nuq4-1pct` and `nuq3-1pct`, and the prompts of the task `passkey`.
    """
    save_byte_model(folder / "hf")
    write_corpus(folder)
    study: dict[str, Any] = {
        "study": "tiny",
        "device": "cpu",
        "seeds": [0, 1, 2],
        "models": {"tiny": {"source": "local", "path": str(folder / "hf")}},
        "calibration": {"windows": 2, "window": 128},
        "schemes": {
            "fp16": {"kind": "fp16"},
            "nuq4-1pct": {"kind": "nuq", "bits": 4, "block_size": 32},
            "nuq3-1pct": {"kind": "nuq", "bits": 3, "block_size": 32},
            "kivi-2": {"kind": "kivi", "bits": 2, "group": 16, "residual": 16},
        },
        "tasks": {
            "ppl": {"suite": "perplexity", "dataset": "essays", "window": 96, "windows": 2},
            "ppl-a": {
                "suite": "perplexity",
                "dataset": "essays",
                "window": 96,
                "windows": 1,
                "protocol": "A",
                "chunk": 40,
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
            "trials": 2,
            "seconds": 0.1,
            "idle_seconds": 0.1,
        },
        "append": {"sizes": [64, 128], "kv_heads": 2, "head_dim": 16, "rounds": 5},
        "kernels": {
            "cases": {"tiny-1x64": {"shape": "tiny", "tokens": 64, "measure": ["pack", "prefill"]}},
            "rounds": 5,
        },
        "pathvars": {"results": str(folder / "r")},
    }
    (folder / "study.json").write_text(json.dumps(study))
    base = ["--study", str(folder / "study.json"), "--model", "tiny"]
    ours = ["--model-manifest", str(folder / "model.json")]
    data = ["--data-manifest", str(folder / "data.json")]
    stats = str(folder / "r/calib/stats.safetensors")
    assert main(["fetch-model", *base, "--out", str(folder / "model.json")]) == 0
    assert main(["calibrate", *base, *ours, *data, "--device", "cpu", "--out", stats]) == 0
    for scheme in ("nuq4-1pct", "nuq3-1pct"):
        out = str(folder / f"r/models/{scheme}/quantizer.json")
        assert main(["quantize", *base, "--scheme", scheme, "--stats", stats, "--out", out]) == 0
    prompts = ["--task", "passkey", "--out", str(folder / "passkey.jsonl.gz"), *ours]
    assert main(["prompts", *base, *prompts, "--seeds", "0", "1", "2"]) == 0
    return folder


def options(work: Path, scheme: str) -> list[str]:
    """Options that all verbs of a scheme take."""
    words = ["--study", str(work / "study.json"), "--model", "tiny", "--scheme", scheme]
    words += ["--model-manifest", str(work / "model.json"), "--device", "cpu"]
    if scheme.startswith("nuq"):
        words += ["--quantizer", str(work / f"r/models/{scheme}/quantizer.json")]
    return words


def evaluate(work: Path, scheme: str, task: str, out: Path, *seeds: int) -> int:
    """Evaluates seeds of a task; returns the verb's exit status."""
    words = ["evaluate", *options(work, scheme), "--task", task, "--out-dir", str(out)]
    words += ["--data-manifest", str(work / "data.json"), "--resume-dir", str(work / "resume")]
    if task == "passkey":
        words += ["--prompts", str(work / "passkey.jsonl.gz")]
    return main([*words, "--seeds", *map(str, seeds)])
