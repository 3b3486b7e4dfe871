"""What every result depends on: digests of specifications and of stage versions (torch-free).

A stage's VERSION is bumped by hand when its meaning changes; that reruns the stage and nothing
before it. Comments and speed-ups do not bump it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, unknown
from kvquant.formats.files import parse_json
from kvquant.study.config import SUITES, Study, TaskSpec, digest
from kvquant.study.models import CHAT_OPTIONS, ModelSpec
from kvquant.study.scheme_kinds import CalibratedScheme
from kvquant.study.schemes import SchemeSpec
from kvquant.study.timing import EnergySpec, TimingSpec

VERSIONS = {
    # Of files' forms, not of what they hold: 2 has hashes. A bump makes the files again.
    **{"fetch": 2, "statistics-file": 2, "quantizer-file": 2},
    **{"calibrate": 1, "quantize": 1, "prompts": 1, "evaluate": 1},
    **{"throughput": 1, "append": 1, "kernels": 1},
    "energy": 2,  # 2: of the model's own GPUs; each processor socket once; settled averages
}


def needs_calibration(scheme: SchemeSpec) -> bool:
    """Whether the scheme needs a quantizer built from calibration statistics."""
    return isinstance(scheme, CalibratedScheme)


def dataset_of(task: TaskSpec) -> str | None:
    """The text a task reads, or None when it makes its own."""
    return task.dataset_name()


def asks_prompts(task: TaskSpec) -> bool:
    """Whether the task's answers are generated, to prompts that are prepared once for all."""
    return SUITES[task.suite].asks_prompts


@functools.cache
def settled(file: str, digest: str) -> bool:
    """Whether a JSON file is there and records `digest`: it need not be made again."""
    try:
        found = parse_json(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("spec_digest") == digest


def weights_digest(model: ModelSpec) -> str:
    """Of what a fetched model depends on: not on the machines that will use it."""
    return digest(model.model_dump(mode="json", exclude={"gpus", "mem_gb", *CHAT_OPTIONS}))


def _weights(model: ModelSpec) -> dict[str, Any]:
    """A model without the options that its chat template alone depends on."""
    return model.model_dump(mode="json", exclude=set(CHAT_OPTIONS))


def _chat(study: Study, model: str, task: TaskSpec) -> list[dict[str, Any]]:
    """What a task's prompts owe to the model's chat template; nothing at the defaults."""
    if not SUITES[task.suite].uses_chat:
        return []
    chosen = study.model(model).model_dump(mode="json", include=set(CHAT_OPTIONS))
    return [chosen] if chosen else []


def calibration_digest(study: Study, model: str) -> str:
    """Digest of a model's calibration statistics."""
    return digest(_weights(study.model(model)), study.calibration, VERSIONS["calibrate"])


def quantizer_digest(study: Study, model: str, scheme: str) -> str:
    """Digest of a scheme as built for a model; without calibration, of the scheme alone."""
    spec = study.scheme(scheme)
    if not needs_calibration(spec):
        return digest(_weights(study.model(model)), spec)
    return digest(calibration_digest(study, model), spec, VERSIONS["quantize"])


def prompts_digest(study: Study, model: str, task: str) -> str:
    """Digest of what a task asks a model, whatever the seeds."""
    chosen = study.task(task)
    spec = chosen.model_dump(mode="json", exclude={"minutes", "batch_size"})
    chat = _chat(study, model, chosen)
    return digest(weights_digest(study.model(model)), spec, VERSIONS["prompts"], *chat)


def prompts_name(study: Study, model: str, task: str) -> str:
    """Names a file of prompts by all that it holds: a file of this name is never made again."""
    return digest(prompts_digest(study, model, task), sorted(study.seeds))


def eval_digest(study: Study, model: str, scheme: str, task: str, seed: int) -> str:
    """Digest of one evaluation result. Expected run times and windows a batch do not count."""
    chosen = study.task(task)
    spec = chosen.model_dump(mode="json", exclude=set(chosen.speed_options))
    versions = [VERSIONS["evaluate"]]
    if asks_prompts(chosen):
        versions.append(VERSIONS["prompts"])
    chat = _chat(study, model, chosen)
    return digest(quantizer_digest(study, model, scheme), spec, seed, versions, *chat)


def _timing(spec: TimingSpec | EnergySpec, workload: str) -> dict[str, object]:
    rest = spec.model_dump(mode="json", exclude={"workloads", "schemes", "reps"})
    return {
        "workload": spec.workloads[workload].model_dump(mode="json", exclude={"schemes"}),
        **rest,
    }


def perf_digest(study: Study, model: str, scheme: str, workload: str) -> str:
    """Digest of one throughput result."""
    timing = _timing(study.throughput, workload)
    return digest(quantizer_digest(study, model, scheme), timing, VERSIONS["throughput"])


def energy_digest(study: Study, model: str, scheme: str, workload: str) -> str:
    """Digest of one energy result."""
    timing = _timing(study.energy, workload)
    return digest(quantizer_digest(study, model, scheme), timing, VERSIONS["energy"])


def append_digest(study: Study) -> str:
    """Digest of an append result: shapes, sizes and the schemes themselves, no model."""
    if study.append is None:
        raise UserError("append: this study has no such section")
    spec = study.append.model_dump(mode="json", exclude={"schemes", "reps", "minutes"})
    schemes = {name: study.scheme(name).model_dump(mode="json") for name in study.append_schemes()}
    reference = study.scheme(study.headline) if study.append.concatenation else None
    return digest(spec, schemes, reference, VERSIONS["append"])


def kernels_digest(study: Study, case: str) -> str:
    """Digest of a case of the kernel benchmark: its shape, rounds, and the schemes it times."""
    if study.kernels is None:
        raise UserError("kernels: this study has no such section")
    if case not in study.kernels.cases:
        raise unknown("case", case, study.kernels.cases)
    spec = study.kernels.cases[case]
    rest = study.kernels.model_dump(mode="json", exclude={"cases", "minutes"})
    schemes = {name: study.scheme(name).model_dump(mode="json") for name in spec.peers}
    return digest(spec, rest, study.scheme(study.headline), schemes, VERSIONS["kernels"])
