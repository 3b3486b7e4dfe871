"""A study over a tiny saved model, for the two verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvquant.fetch.model import fetch_model
from kvquant.study.models import ModelSpec
from tests.support.models import tiny_model
from tests.support.text import write_corpus


@pytest.fixture(scope="package")
def model_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a saved model of 512 positions."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    manifest = folder / "manifest.json"
    fetch_model("tiny", ModelSpec(source="local", path=str(folder)), manifest)
    return manifest


@pytest.fixture
def raw_study(model_manifest: Path) -> dict[str, Any]:
    """The study; tests change it before they save it."""
    workloads = {
        "p64": {"prompt": 64, "batch_size": 3, "answer": 2, "ragged": True},
        "p32": {"prompt": 32, "answer": 0},
        "long": {"prompt": 511, "answer": 2},
    }
    return {
        "study": "tiny",
        "device": "cpu",
        "models": {"tiny": {"source": "local", "path": str(model_manifest.parent)}},
        "schemes": {
            "fp16": {"kind": "fp16"},
            "nuq3": {"kind": "nuq", "bits": 3},
            "kivi-4": {"kind": "kivi", "bits": 4, "group": 16, "residual": 16},
        },
        "headline": "kivi-4",
        "tasks": {"passkey": {"suite": "passkey"}},
        "throughput": {"workloads": workloads, "warmup": 1, "iterations": 2, "max_seconds": 0.01},
        "energy": {"workloads": workloads, "trials": 2, "seconds": 0.05, "idle_seconds": 0.1},
    }


@pytest.fixture
def command(tmp_path: Path, model_manifest: Path, raw_study: dict[str, Any]) -> Any:
    """Builds a verb's command line; the record goes to `tmp_path / "rep0.json"`."""

    def build(verb: str, **changed: str) -> list[str]:
        (tmp_path / "study.json").write_text(json.dumps(raw_study))
        options = {
            "study": str(tmp_path / "study.json"),
            "model": "tiny",
            "scheme": "kivi-4",
            "workload": "p64",
            "rep": "0",
            "device-name": "cpu",
            "device": "cpu",
            "model-manifest": str(model_manifest),
            "data-manifest": str(write_corpus(tmp_path)),
            "out": str(tmp_path / "rep0.json"),
        }
        options |= {name.replace("_", "-"): value for name, value in changed.items()}
        return [verb, *(word for k, v in options.items() for word in (f"--{k}", v))]

    return build
