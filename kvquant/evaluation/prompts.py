"""`kvquant prompts`: prepares a task's prompts for all seeds as one file.

The prompts are the same for every scheme, so they are made once per model and task, without the
model's weights and without a GPU.
"""

from __future__ import annotations

import argparse
import os
import time
from importlib.metadata import version
from pathlib import Path

from kvquant.errors import UserError
from kvquant.fetch.texts import Part, load_text, read_data_manifest
from kvquant.runtime.progress import Progress, note
from kvquant.study.config import Study, load_study
from kvquant.study.digests import asks_prompts, prompts_digest

PACKAGES = ("lm-eval", "tokenizers", "transformers")


def make_prompts(
    study: Study,
    model: str,
    task: str,
    seeds: list[int],
    *,
    model_manifest: str | Path,
    out: str | Path,
    data_manifest: str | Path | None = None,
) -> None:
    """Prepares the prompts of seeds and writes them to `out`.

    Raises:
        UserError: A name is unknown, a file is missing, the task has no prompts or does not fit the
            model, or `out` exists with other content.
    """
    spec = study.task(task)
    digest = prompts_digest(study, model, task)
    if not asks_prompts(spec):
        raise UserError(f"--task: '{task}' is of suite '{spec.suite}', which has no prompts")
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise UserError("--seeds: must be distinct and not negative")
    if spec.dataset_name() and data_manifest is None:
        raise UserError(f"--data-manifest: task '{task}' reads '{spec.dataset_name()}'")
    # Imported late, so that wrong names are reported at once.
    from kvquant.evaluation.base import Source
    from kvquant.evaluation.chat import Chat
    from kvquant.evaluation.prompt_file import probe, write_prompts
    from kvquant.evaluation.registry import answered
    from kvquant.fetch.model_manifest import study_manifest
    from kvquant.models.loading import load_tokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer, limit = load_tokenizer(study_manifest(model_manifest, study, model))

    def text(part: Part) -> str:
        assert data_manifest is not None
        name = spec.dataset_name()
        return load_text(data_manifest, part, name, study.datasets.get(str(name)))

    source = Source(tokenizer, limit, task, text, Chat.of(study.model(model)))
    start, found = time.monotonic(), {}
    with Progress(f"{model} {task} prompts", len(seeds), unit="seeds") as progress:
        for seed in seeds:
            found[seed] = answered(spec.suite).prepare(source, spec, seed)
            progress.update(len(found))
    header = write_prompts(
        out,
        found,
        spec_digest=digest,
        spec=spec.meaning("minutes", "batch_size"),
        data_sha256=read_data_manifest(data_manifest).sha256 if data_manifest else None,
        packages={name: version(name) for name in PACKAGES},
        probe=probe(tokenizer),
    )
    count = sum(entry.prompts for entry in header.seeds)
    tokens = sum(len(prompt.tokens) for seed in found.values() for prompt in seed.prompts)
    note(f"{model} {task}: {count} prompts, {tokens} tokens, {time.monotonic() - start:.1f} s")


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant prompts`."""
    make_prompts(
        load_study(args.study),
        args.model,
        args.task,
        args.seeds,
        model_manifest=args.model_manifest,
        out=args.out,
        data_manifest=args.data_manifest,
    )
