"""A task measured as the workflow does it: prompts into a file, the file to a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvquant.evaluation.base import Context, Source, SuiteResult
from kvquant.evaluation.generated import SeedPrompts
from kvquant.evaluation.prompt_file import PromptFile, probe, write_prompts
from kvquant.evaluation.registry import answered, run_suite
from kvquant.study.tasks import TaskSpec

DIGEST = "0" * 16


def prepare(qm: Any, task: str, text: str, spec: TaskSpec, seed: int) -> SeedPrompts:
    """A seed's prompts in the tokens of a model."""
    source = Source(qm.tokenizer, qm.position_limit, task, lambda part: text)
    return answered(spec.suite).prepare(source, spec, seed)


def write(path: Path, tokenizer: Any, seeds: dict[int, SeedPrompts]) -> None:
    """A file of prompts with the digest `DIGEST`."""
    write_prompts(
        path,
        seeds,
        spec_digest=DIGEST,
        spec={},
        data_sha256=None,
        packages={},
        probe=probe(tokenizer),
    )


def asker(task: str, text: str = "") -> Callable[[Any, TaskSpec, int], SuiteResult]:
    """(model, task, seed) to the seed's result; `text` is the task's data set."""

    def measure(qm: Any, spec: TaskSpec, seed: int) -> SuiteResult:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompts.jsonl.gz"
            write(path, qm.tokenizer, {seed: prepare(qm, task, text, spec, seed)})
            file = PromptFile(path, DIGEST, [seed])
            file.check_tokenizer(qm.tokenizer)
            context = Context(qm, task, lambda part: text)
            return run_suite(context, spec, [seed], file.read([seed]))[0]

    return measure


def passkey_study(tiny_dir: Path, **task: Any) -> dict[str, Any]:
    """A study of the saved tiny model; keywords change its task `passkey`."""
    passkey = {"suite": "passkey", "length": 200, "samples": 2, "batch_size": 2, **task}
    return {
        "study": "check",
        "seeds": [0, 1, 2],
        "headline": "kivi-4",
        "models": {"tiny": {"source": "local", "path": str(tiny_dir)}},
        "schemes": {
            "fp16": {"kind": "fp16"},
            "kivi-4": {"kind": "kivi", "bits": 4, "group": 16, "residual": 16},
            "nuq3": {"kind": "nuq", "bits": 3},
        },
        "tasks": {
            "passkey": passkey,
            "long": {"suite": "passkey", "length": 100_000},
            "ppl": {"suite": "perplexity", "dataset": "essays", "window": 64, "windows": 2},
        },
    }
