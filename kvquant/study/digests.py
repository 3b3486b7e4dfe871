"""Digests of everything that a result depends on: specifications and versions of stages.

A stage's version is increased by hand when its meaning changes, which reruns this stage and those
after it. Comments and speed-ups do not change it. This module does not import torch.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, unknown
from kvquant.formats.files import parse_json
from kvquant.study.config import Study, digest
from kvquant.study.models import CHAT_OPTIONS, TERMS, ModelSpec
from kvquant.study.scheme_kinds import PROMPT_ATTENTION, CalibratedScheme
from kvquant.study.tasks import SUITES, TaskSpec
from kvquant.study.timing import TimedStage

VERSIONS = {
    # Versions of file formats, not of content: 2 has hashes, 3 the scales of heads of values. An
    # increase makes the files again.
    **{"fetch": 2, "statistics-file": 3, "quantizer-file": 3},
    **{"calibrate": 1, "quantize": 1, "prompts": 1, "evaluate": 1},
    **{"append": 1, "kernels": 1, "jobs": 1},
    "prompt-attention": 2,  # 8-bit; 2: fine tiles
    "throughput": 2,  # 2: prompts of text
    "energy": 3,  # 2: only the model's own GPUs, each CPU socket once, settled averages; 3: text
}


def asks_prompts(task: TaskSpec) -> bool:
    """Returns whether the task generates answers to prompts that are prepared once."""
    return SUITES[task.suite].asks_prompts


@functools.cache
def settled(file: str, digest: str, samples: int = 0, roped_keys: bool = False) -> bool:
    """Returns whether a JSON file exists and is up to date.

    Args:
        file: The JSON file.
        digest: What it must record.
        samples: Number of whole tokens that statistics must have.
        roped_keys: Whether statistics must have histograms of keys after RoPE.
    """
    try:
        found = parse_json(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict) or found.get("spec_digest") != digest:
        return False
    held = found.get("samples", 0)
    if roped_keys and found.get("roped_keys") is not True:
        return False
    return isinstance(held, int) and held >= samples


def weights_digest(model: ModelSpec) -> str:
    """Returns the digest of what a fetched model depends on, without the machines' resources."""
    return digest(model.meaning("gpus", "mem_gb", "dtype", *CHAT_OPTIONS, *TERMS))


def _weights(model: ModelSpec) -> dict[str, Any]:
    """Returns a model's specification without the options of its chat template.

    Results do not depend on the number of GPUs that share the layers, so that it counts as one. On
    a CPU there is none: the digests of published records tell the two apart.
    """
    return model.meaning(*CHAT_OPTIONS, *TERMS) | {"gpus": min(model.gpus, 1)}


def _chat(study: Study, model: str, task: TaskSpec) -> list[dict[str, Any]]:
    """Returns the chat options that a task's prompts depend on, or nothing for the defaults."""
    if not SUITES[task.suite].uses_chat:
        return []
    chosen = study.model(model).model_dump(mode="json", include=set(CHAT_OPTIONS))
    return [chosen] if chosen else []


def _own_text(study: Study, dataset: str | None) -> list[dict[str, Any]]:
    """Returns what the files of an own data set hold, or nothing for any other data set."""
    return [study.datasets[dataset].identity()] if dataset in study.datasets else []


def calibration_digest(study: Study, model: str, calibration: str | None = None) -> str:
    """Returns the digest of a model's calibration statistics.

    Args:
        study: The study.
        model: Name of the model.
        calibration: Entry of `calibrations`; None: the study's `calibration`.
    """
    spec = study.calibrated_by(calibration)
    own = _own_text(study, spec.dataset)
    return digest(_weights(study.model(model)), spec, VERSIONS["calibrate"], *own)


def collection_digest(study: Study, model: str, calibration: str | None = None) -> str:
    """Returns what makes the workflow calibrate again: the digest, and what some schemes add.

    These are a sample of tokens and the histograms of keys after RoPE. Other schemes do not depend
    on them, so that they are no part of the digest that results are known by.
    """
    samples = study.sampled_tokens(calibration)
    added = [str(samples)] if samples else []
    added += ["roped-keys"] if study.keys_after_rope(calibration) else []
    return "+".join([calibration_digest(study, model, calibration), *added])


def samples_of(study: Study, scheme: str) -> int:
    """Returns how many whole tokens the statistics must have that a scheme is built from."""
    spec = study.scheme(scheme)
    asked = spec.sampled_tokens if isinstance(spec, CalibratedScheme) else 0
    calibration = study.calibrated_by(study.calibration_name(scheme))
    return min(asked, calibration.windows * (calibration.window - calibration.sinks))


def roped_keys_of(study: Study, scheme: str) -> bool:
    """Returns whether the statistics that a scheme is built from must have keys after RoPE."""
    spec = study.scheme(scheme)
    return isinstance(spec, CalibratedScheme) and spec.keys_after_rope


def quantizer_digest(study: Study, model: str, scheme: str) -> str:
    """Returns the digest of a scheme built for a model, from calibration if it needs one.

    Schemes that differ in the attention of prompts alone have the same calibrated tables.
    """
    spec = study.scheme(scheme)
    if not spec.registration.calibrated:
        return digest(_weights(study.model(model)), spec)
    spec = spec.model_copy(update={PROMPT_ATTENTION: "16-bit"})
    calibration = calibration_digest(study, model, study.calibration_name(scheme))
    return digest(calibration, spec, VERSIONS["quantize"])


def tables_scheme(study: Study, scheme: str) -> str:
    """Returns the scheme of a study whose quantizer a scheme uses: its own, or its 16-bit twin's.

    Schemes that differ in the attention of prompts alone share one, which is built once.
    """
    if not study.scheme(scheme).registration.calibrated:
        return scheme
    return study.sixteen_bit_twin(scheme) or scheme


def _used_digest(study: Study, model: str, scheme: str) -> str:
    """Returns the digest of a scheme as it is measured: its tables and the attention of prompts."""
    spec, tables = study.scheme(scheme), quantizer_digest(study, model, scheme)
    if spec.prompt_attention == "16-bit":
        return tables
    return digest(tables, spec.prompt_attention, VERSIONS["prompt-attention"])


def prompts_digest(study: Study, model: str, task: str) -> str:
    """Returns the digest of a task's prompts for a model, independent of the seeds."""
    chosen = study.task(task)
    spec = chosen.meaning("minutes", "batch_size")
    chat = _chat(study, model, chosen)
    own = _own_text(study, chosen.dataset_name())
    return digest(weights_digest(study.model(model)), spec, VERSIONS["prompts"], *chat, *own)


def prompts_name(study: Study, model: str, task: str) -> str:
    """Returns the name of a prompt file, which identifies its content including the seeds."""
    return digest(prompts_digest(study, model, task), sorted(study.seeds))


def eval_digest(study: Study, model: str, scheme: str, task: str, seed: int) -> str:
    """Returns the digest of an evaluation result, without expected run time and batch size."""
    chosen = study.task(task)
    spec = chosen.meaning(*chosen.speed_options)
    versions = [VERSIONS["evaluate"]]
    if asks_prompts(chosen):
        versions.append(VERSIONS["prompts"])
    chat = _chat(study, model, chosen)
    own = _own_text(study, chosen.dataset_name())
    return digest(_used_digest(study, model, scheme), spec, seed, versions, *chat, *own)


def _timing(spec: TimedStage, workload: str) -> dict[str, object]:
    rest = spec.model_dump(mode="json", exclude={"workloads", "schemes", "reps"})
    return {
        "workload": spec.workloads[workload].meaning("schemes"),
        **rest,
    }


def _timed(study: Study, stage: str) -> list[Any]:
    """Returns the text of timed prompts and the version of a timed stage."""
    dataset = study.calibration.dataset
    return [dataset, VERSIONS[stage], *_own_text(study, dataset)]


def perf_digest(study: Study, model: str, scheme: str, workload: str) -> str:
    """Returns the digest of one throughput result."""
    timing = _timing(study.throughput, workload)
    return digest(_used_digest(study, model, scheme), timing, *_timed(study, "throughput"))


def energy_digest(study: Study, model: str, scheme: str, workload: str) -> str:
    """Returns the digest of one energy result."""
    timing = _timing(study.energy, workload)
    return digest(_used_digest(study, model, scheme), timing, *_timed(study, "energy"))


def append_digest(study: Study) -> str:
    """Returns the digest of an append result: shapes, sizes and schemes, but no model."""
    if study.append is None:
        raise UserError("append: this study has no such section: add it to the study file")
    spec = study.append.model_dump(mode="json", exclude={"schemes", "reps", "minutes"})
    schemes = {name: study.scheme(name).meaning() for name in study.append_schemes()}
    reference = study.scheme(study.headline) if study.append.concatenation else None
    return digest(spec, schemes, reference, VERSIONS["append"])


def kernels_digest(study: Study, case: str) -> str:
    """Returns the digest of a kernel benchmark's case: shape, rounds and timed schemes."""
    if study.kernels is None:
        raise UserError("kernels: this study has no such section: add it to the study file")
    if case not in study.kernels.cases:
        raise unknown("case", case, study.kernels.cases)
    spec = study.kernels.cases[case]
    rest = study.kernels.model_dump(mode="json", exclude={"cases", "minutes"})
    schemes = {name: study.scheme(name).meaning() for name in spec.peers}
    scheme = study.scheme(study.kernel_scheme(spec))
    return digest(spec, rest, scheme, schemes, VERSIONS["kernels"])


def jobs_digest(study: Study, case: str) -> str:
    """Returns the digest of a case of whole jobs: shape, lengths, memory and timed schemes."""
    if study.jobs is None:
        raise UserError("jobs: this study has no such section: add it to the study file")
    if case not in study.jobs.cases:
        raise unknown("case", case, study.jobs.cases)
    spec = study.jobs.cases[case]
    rest = study.jobs.model_dump(mode="json", exclude={"cases", "minutes"})
    schemes = {name: study.scheme(name).model_dump(mode="json") for name in spec.schemes}
    return digest(spec, rest, schemes, VERSIONS["jobs"])
