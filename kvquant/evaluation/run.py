"""`kvquant evaluate`: measures one scheme on one task of the study for several seeds.

A finished seed is kept in the resume folder under the digest of everything that it depends on, its
samples first and its record last. A job that was killed, or that has more seeds now, takes the
finished seeds from there and from the published records, and measures the rest. Seeds may share
batches (:mod:`kvquant.evaluation.generated`). The answers of a seed do not depend on the others,
only its part of a batch's padding does. Several tasks of one scheme may share a process, and then
the model in it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvquant.energy.gpus import devices_of
from kvquant.errors import UserError
from kvquant.evaluation import seed_files
from kvquant.evaluation.base import Context, SuiteResult
from kvquant.fetch.model_manifest import study_manifest
from kvquant.fetch.texts import Part, load_text, read_data_manifest
from kvquant.formats.files import read_json
from kvquant.runtime.devices import claim
from kvquant.runtime.progress import Progress, note
from kvquant.runtime.provenance import environment
from kvquant.study.archive import read_archive
from kvquant.study.config import Study, load_study
from kvquant.study.digests import (
    asks_prompts,
    eval_digest,
    prompts_digest,
    quantizer_digest,
)
from kvquant.study.places import place_of
from kvquant.study.records import EvalRecord
from kvquant.study.tasks import TaskSpec

if TYPE_CHECKING:
    from kvquant.evaluation.prompt_file import PromptFile
    from kvquant.models.loading import QuantizedModel


def _line(record: EvalRecord, where: str) -> str:
    return (
        f"{record.model} {record.scheme} {record.task} seed {record.seed}: "
        f"{record.metric} {record.value:.4f}, {record.samples} samples, "
        f"{record.bits_per_element:.3f} bits/element, {record.seconds:.1f} s{where}"
    )


class SharedModel:
    """Loads the model of a scheme when the first task needs it, and keeps it for the next ones."""

    def __init__(self) -> None:
        self._found: QuantizedModel | None = None
        self._key: tuple[str, ...] = ()

    def get(
        self,
        study: Study,
        model: str,
        scheme: str,
        manifest: str | Path,
        quantizer: str | Path | None,
        device: str,
    ) -> QuantizedModel:
        """Returns the model with the cache of a scheme; all tasks must ask for the same one."""
        from kvquant.models.loading import load_quantized_model

        key = (model, scheme, str(manifest), str(quantizer), device)
        assert self._found is None or key == self._key
        if self._found is None:
            self._key = key
            self._found = load_quantized_model(
                study_manifest(manifest, study, model),
                study.scheme(scheme),
                quantizer=quantizer,
                device_map=claim(device, study.model(model).gpus, f"models.{model}.gpus"),
            )
        return self._found


def evaluate(
    study: Study,
    model: str,
    scheme: str,
    task: str,
    seeds: list[int],
    *,
    model_manifest: str | Path,
    out_dir: str | Path,
    prompts: str | Path | None = None,
    data_manifest: str | Path | None = None,
    quantizer: str | Path | None = None,
    device: str = "auto",
    resume_dir: str | Path | None = None,
    shared: SharedModel | None = None,
) -> list[EvalRecord]:
    """Measures every unfinished seed and writes all seeds below `out_dir`.

    `shared` keeps the model for further tasks of the same scheme.

    Raises:
        UserError: A name is unknown, a file is missing, the task or prompts do not fit, or an
            existing result is damaged, of another specification or for other prompts.
    """
    scheme_spec = study.scheme(scheme)
    task_spec = study.task(task)
    study.model(model)
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise UserError("--seeds: must be distinct and not negative")
    if scheme_spec.registration.calibrated and quantizer is None:
        raise UserError(f"--quantizer: scheme '{scheme}' needs a quantizer.json (run quantize)")
    asked = _asked(study, model, task, seeds, prompts)
    finished: dict[int, tuple[EvalRecord, str]] = {}
    digests = {seed: eval_digest(study, model, scheme, task, seed) for seed in seeds}
    keep = Path(resume_dir) if resume_dir is not None else None
    now = _inputs(study, model, task, model_manifest, data_manifest, quantizer)
    published = {} if study.published is None else read_archive(study.published)
    for seed in seeds:
        folder = Path(out_dir) / f"seed{seed}"
        wanted = (digests[seed], asked.sha256(seed) if asked else None, now)
        found, where = seed_files.read_pair(folder, *wanted), ", already there"
        if found is None and (line := published.get(_place(model, scheme, task, seed))) is not None:
            found, where = seed_files.read_published(line, *wanted), ", published"
        if found is None and keep is not None:
            found, where = seed_files.kept(keep / digests[seed], *wanted), ", resumed"
        if found is not None:
            finished[seed] = found
            seed_files.copy(*found, folder)
            note(_line(found[0], where))
    missing = [seed for seed in seeds if seed not in finished]
    if missing:
        runner = _loader(
            study,
            model,
            scheme,
            task,
            model_manifest,
            asked,
            data_manifest,
            quantizer,
            device,
            shared or SharedModel(),
        )
        together = _seeds_together(task_spec)
        for first in range(0, len(missing), together):
            group = {seed: digests[seed] for seed in missing[first : first + together]}
            for seed, (record, result) in zip(group, runner(group), strict=True):
                folder = Path(out_dir) / f"seed{seed}"
                if keep is not None:
                    finished[seed] = seed_files.store(keep / digests[seed], record, result)
                    seed_files.copy(*finished[seed], folder)
                else:
                    finished[seed] = seed_files.store(folder, record, result)
                note(_line(finished[seed][0], ""))
    return [finished[seed][0] for seed in seeds]


def _place(model: str, scheme: str, task: str, seed: int) -> str:
    return place_of("eval", {"model": model, "scheme": scheme, "task": task, "seed": seed})


def _inputs(
    study: Study,
    model: str,
    task: str,
    model_manifest: str | Path,
    data_manifest: str | Path | None,
    quantizer: str | Path | None,
) -> dict[str, str]:
    """Returns the hashes of the files that seeds depend on, from manifests and without torch.

    Missing files are left out. They are not needed if all seeds are finished, and reported if not.
    """
    found = {}
    if Path(model_manifest).exists():
        found["model"] = study_manifest(model_manifest, study, model).identity
    if quantizer is not None and Path(quantizer).exists():
        hashes = read_json(quantizer, "quantizer", "build it again (`kvquant quantize`)")
        if isinstance(hashes, dict) and isinstance(hashes.get("tensors_sha256"), str):
            found["quantizer"] = hashes["tensors_sha256"]
    reads = not asks_prompts(study.task(task))
    if reads and data_manifest is not None and Path(data_manifest).exists():
        found["text"] = read_data_manifest(data_manifest).sha256
    return found


def _asked(
    study: Study, model: str, task: str, seeds: list[int], prompts: str | Path | None
) -> PromptFile | None:
    """Returns the file of prompts, or None for a suite without prompts."""
    if not asks_prompts(study.task(task)):
        if prompts is not None:
            raise UserError(f"--prompts: task '{task}' reads a text and has no prompts")
        return None
    if prompts is None:
        raise UserError(f"--prompts: task '{task}' needs the file of its prompts (run prompts)")
    from kvquant.evaluation.prompt_file import PromptFile

    return PromptFile(prompts, prompts_digest(study, model, task), seeds)


def _seeds_together(task: TaskSpec) -> int:
    """Returns the number of seeds that are measured together before results are written."""
    samples = task.sample_count()
    if not asks_prompts(task) or not samples:
        return 1
    return max(1, task.batch_size // samples)


def _loader(
    study: Study,
    model: str,
    scheme: str,
    task: str,
    model_manifest: str | Path,
    asked: PromptFile | None,
    data_manifest: str | Path | None,
    quantizer: str | Path | None,
    device: str,
    shared: SharedModel,
) -> Callable[[dict[int, str]], list[tuple[EvalRecord, SuiteResult]]]:
    """Loads the model and returns a function that measures seeds, given with their digests."""
    # Imported late: a job with finished seeds or wrong names needs no torch.
    from kvquant.evaluation.registry import run_suite
    from kvquant.fetch.text_overlap import check_apart
    from kvquant.quantization.quantizer_file import check_digest

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
    task_spec = study.task(task)
    if asked is None and task_spec.dataset_name() and data_manifest is None:
        raise UserError(f"--data-manifest: task '{task}' reads '{task_spec.dataset_name()}'")
    if quantizer is not None and study.scheme(scheme).registration.calibrated:
        built = check_digest(Path(quantizer), quantizer_digest(study, model, scheme))
        if asked is None and data_manifest is not None and built.text is not None:
            check_apart(built.text, data_manifest)
    qm = shared.get(study, model, scheme, model_manifest, quantizer, device)
    if asked is not None:
        asked.check_tokenizer(qm.tokenizer)

    def text(part: Part) -> str:
        assert data_manifest is not None
        name = task_spec.dataset_name()
        return load_text(data_manifest, part, name, study.datasets.get(str(name)))

    read = (
        {}
        if asked is not None or data_manifest is None
        else {"text": read_data_manifest(data_manifest).sha256}
    )

    def record(seed: int, digest: str, result: SuiteResult, seconds: float) -> EvalRecord:
        inputs = qm.inputs | read | ({"prompts": asked.sha256(seed)} if asked else {})
        where = environment(devices_of(qm.model.parameters()))
        return _record(study, model, scheme, task, seed, digest, inputs, result, seconds, where)

    def measure(seeds: dict[int, str]) -> list[tuple[EvalRecord, SuiteResult]]:
        start = time.monotonic()
        named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        with Progress(f"{model} {scheme} {task} {named}", unit="samples") as progress:

            def report(done: int, total: int) -> None:
                progress.total = total
                progress.update(done)

            prompts = asked.read(list(seeds)) if asked else []
            context = Context(qm, task, text, report, study.evaluation.batch_tokens)
            results = run_suite(context, task_spec, list(seeds), prompts)
        seconds = (time.monotonic() - start) / len(seeds)
        return [
            (record(seed, digest, result, seconds), result)
            for (seed, digest), result in zip(seeds.items(), results, strict=True)
        ]

    return measure


def _record(
    study: Study,
    model: str,
    scheme: str,
    task: str,
    seed: int,
    digest: str,
    inputs: dict[str, str],
    result: SuiteResult,
    seconds: float,
    where: dict[str, Any],
) -> EvalRecord:
    return EvalRecord(
        study=study.study,
        spec_digest=digest,
        environment=where,
        inputs=inputs,
        model=model,
        scheme=scheme,
        task=task,
        seed=seed,
        suite=study.task(task).suite,
        protocol=result.protocol,
        prompt_attention=study.scheme(scheme).prompt_attention,
        metric=result.metric,
        higher_is_better=result.higher_is_better,
        value=result.value,
        metrics=result.metrics,
        samples=len(result.rows),
        tokens=result.tokens,
        cache_bytes=result.cache_bytes,
        cache_elements=result.cache_elements,
        bits_per_element=8.0 * result.cache_bytes / result.cache_elements,
        samples_sha256="",
        prompts_sha256=inputs.get("prompts"),
        seconds=seconds,
    )


def _one_per_task(option: str, given: list[str], tasks: list[str], what: str) -> dict[str, str]:
    """Returns the files of an option by task.

    Raises:
        UserError: There is not one file for each of these tasks.
    """
    if len(given) != len(tasks):
        raise UserError(
            f"{option}: needs one {what} ({', '.join(tasks) or 'none'}), in their order"
        )
    return dict(zip(tasks, given, strict=True))


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant evaluate`."""
    study = load_study(args.study)
    asking = {task: asks_prompts(study.task(task)) for task in args.task}
    tasks = list(asking)
    if len(tasks) < len(args.task):
        raise UserError("--task: a task is given twice")
    folders = _one_per_task("--out-dir", args.out_dir, tasks, "folder per task")
    asked = [task for task in tasks if asking[task]] if len(tasks) > 1 else tasks
    read = [task for task in tasks if not asking[task]] if len(tasks) > 1 else tasks
    prompts = texts = {}
    if args.prompts:
        prompts = _one_per_task("--prompts", args.prompts, asked, "file per task with answers")
    if args.data_manifest:
        texts = _one_per_task("--data-manifest", args.data_manifest, read, "manifest per text")
    shared = SharedModel()
    for task in tasks:
        evaluate(
            study,
            args.model,
            args.scheme,
            task,
            args.seeds,
            model_manifest=args.model_manifest,
            out_dir=folders[task],
            prompts=prompts.get(task),
            data_manifest=texts.get(task),
            quantizer=args.quantizer,
            device=args.device,
            resume_dir=args.resume_dir,
            shared=shared,
        )
