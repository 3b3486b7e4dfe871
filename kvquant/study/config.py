"""The study: every key a config file may hold, typed and validated, without importing torch.

The YAML files under ``config/`` are instances of :class:`Study`; the Snakefile and the CLI both
read them through :func:`load_study`, and ``config/schema.json`` is exported from the same classes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from kvquant.errors import UserError, unknown
from kvquant.study.append import AppendSpec
from kvquant.study.checks import problems
from kvquant.study.kernels import KernelCase as KernelCase
from kvquant.study.kernels import KernelsSpec as KernelsSpec
from kvquant.study.models import CHAT_OPTIONS as CHAT_OPTIONS
from kvquant.study.models import ModelSpec as ModelSpec
from kvquant.study.numbers import (
    MAX_BATCH,
    MAX_NAMES,
    MAX_REPS,
    MAX_ROUNDS,
    MAX_SAMPLES,
    MAX_SECONDS,
    MAX_TOKENS,
)
from kvquant.study.overlay import read_study
from kvquant.study.paths import DeviceKey, PathVars
from kvquant.study.schemes import KINDS, MAX_SEED, AnyScheme, SchemeSpec, Strict
from kvquant.study.schemes import CalibratedScheme as CalibratedScheme
from kvquant.study.schemes import Fp8Scheme as Fp8Scheme
from kvquant.study.schemes import Fp16Scheme as Fp16Scheme
from kvquant.study.schemes import Fp16StaticScheme as Fp16StaticScheme
from kvquant.study.schemes import HfFp8Scheme as HfFp8Scheme
from kvquant.study.schemes import HfHqqScheme as HfHqqScheme
from kvquant.study.schemes import HfQuantoScheme as HfQuantoScheme
from kvquant.study.schemes import Int4HadamardScheme as Int4HadamardScheme
from kvquant.study.schemes import KiviScheme as KiviScheme
from kvquant.study.schemes import KvquantRefScheme as KvquantRefScheme
from kvquant.study.schemes import NuqScheme as NuqScheme
from kvquant.study.schemes import TurboQuantScheme as TurboQuantScheme
from kvquant.study.statistics import Margin as Margin
from kvquant.study.statistics import StatisticsSpec as StatisticsSpec
from kvquant.study.tasks import LONGBENCH_TASKS as LONGBENCH_TASKS
from kvquant.study.tasks import RULER_TASKS as RULER_TASKS
from kvquant.study.tasks import EvaluationSpec as EvaluationSpec
from kvquant.study.tasks import LongBenchTask as LongBenchTask
from kvquant.study.tasks import PasskeyTask as PasskeyTask
from kvquant.study.tasks import PerplexityTask as PerplexityTask
from kvquant.study.tasks import RulerTask as RulerTask
from kvquant.study.tasks import TaskSpec as TaskSpec
from kvquant.study.tasks import task_dataset as task_dataset


class CalibrationSpec(Strict):
    """The text and the statistics from which non-uniform codebooks are built."""

    dataset: str = Field("essays", description="text that the windows are cut from")
    windows: int = Field(16, ge=1, le=MAX_SAMPLES, description="number of calibration windows")
    window: int = Field(2048, ge=32, le=MAX_TOKENS, description="tokens in a window")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="chooses where the windows begin")
    sinks: int = Field(
        1, ge=0, le=MAX_TOKENS, description="first tokens of a window that are left out"
    )
    bins: int = Field(
        1024, ge=64, le=MAX_BATCH, multiple_of=4, description="histogram bins per key channel"
    )
    outlier_fractions: list[float] = Field(
        [0.0, 0.01, 0.02], description="value outlier fractions that schemes may use"
    )


class Workload(Strict):
    """One throughput or energy workload."""

    prompt: int = Field(ge=1, le=MAX_TOKENS, description="tokens of the longest prompt")
    batch_size: int = Field(1, ge=1, le=MAX_BATCH, description="prompts per batch")
    answer: int = Field(16, ge=0, le=MAX_TOKENS, description="decoded tokens")
    ragged: bool = Field(False, description="prompt lengths fall evenly to half of `prompt`")
    schemes: list[str] = Field(
        default_factory=list, description="empty: all that the stage measures"
    )


class TimingSpec(Strict):
    """How long and how often a workload is timed."""

    workloads: dict[str, Workload] = Field(
        default_factory=dict, description="workloads by name; none: the stage is not measured"
    )
    schemes: list[str] = Field(default_factory=list, description="empty: all schemes of the study")
    reps: int = Field(1, ge=1, le=MAX_REPS, description="independent jobs per cell")
    warmup: int = Field(5, ge=0, le=MAX_ROUNDS, description="rounds before the timed ones")
    iterations: int = Field(100, ge=1, le=MAX_ROUNDS, description="timed rounds at most")
    max_seconds: float = Field(
        120.0, gt=0, le=MAX_SECONDS, description="stop after this long (at least 5 rounds)"
    )


class EnergySpec(Strict):
    """How energy is measured: trials of at least `seconds`, interleaved with the baseline."""

    workloads: dict[str, Workload] = Field(
        default_factory=dict, description="workloads by name; none: the stage is not measured"
    )
    schemes: list[str] = Field(default_factory=list, description="empty: all schemes of the study")
    reps: int = Field(1, ge=1, le=MAX_REPS, description="independent jobs per cell")
    trials: int = Field(5, ge=1, le=MAX_ROUNDS, description="trials per scheme, in turns")
    seconds: float = Field(
        5.0,
        gt=0,
        le=MAX_SECONDS,
        description="shortest trial; on a GPU at least 5 s, as its counter needs",
    )
    idle_seconds: float = Field(
        5.0, ge=0, le=MAX_SECONDS, description="how long idle power is measured before the trials"
    )
    country: str = Field("POL", description="ISO code for CodeCarbon's offline carbon intensity")


class Study(Strict):
    """A complete study; one YAML file under config/."""

    study: str = Field(description="short name in kebab case")
    title: str = Field("", description="heading of the report and the paper")
    device: DeviceKey = Field(
        "auto", description="name in perf and energy paths; 'auto' asks the GPU"
    )
    gpus: int = Field(
        0, ge=0, le=64, description="GPUs of a throughput or energy job; 0: CPU study"
    )
    protect: bool = Field(False, description="write-protect measured results")
    seeds: list[int] = Field(
        [0, 1, 2, 3, 4],
        min_length=1,
        max_length=MAX_NAMES,
        description="each chooses its own samples or window offsets",
    )
    baseline: str = Field("fp16", description="the scheme that all others are compared with")
    headline: str = Field("nuq3-1pct", description="the scheme whose claims are made")
    data_dir: str | None = Field(
        None, description="folder of local data sets; absent: the hub is asked"
    )
    models: dict[str, ModelSpec] = Field(description="models by name")
    calibration: CalibrationSpec = Field(
        CalibrationSpec(), description="what calibrated schemes are built from"
    )
    schemes: dict[str, SchemeSpec] = Field(description="cache schemes by name")
    tasks: dict[str, TaskSpec] = Field(
        description="evaluation tasks by name, in the order in which they are measured"
    )
    evaluation: EvaluationSpec = Field(
        EvaluationSpec(), description="which schemes run which tasks, and in what batches"
    )
    throughput: TimingSpec = Field(TimingSpec(), description="latency and memory of workloads")
    energy: EnergySpec = Field(EnergySpec(), description="energy of workloads")
    append: AppendSpec | None = Field(
        None, description="cost of a token as the cache grows; absent: not measured"
    )
    kernels: KernelsSpec | None = Field(
        None, description="cases of the kernel benchmark; absent: not measured"
    )
    statistics: StatisticsSpec = Field(
        StatisticsSpec(), description="how schemes are compared with the baseline"
    )
    pathvars: PathVars = Field(
        default_factory=dict,
        description="folders of the workflow by name: results, paper, logs, cache",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        found = list(problems(self))
        if found:
            raise ValueError("\n".join(found))
        return self

    def model(self, name: str) -> ModelSpec:
        """The model's entry, or an error with the nearest names."""
        if name not in self.models:
            raise unknown("model", name, self.models)
        return self.models[name]

    def scheme(self, name: str) -> AnyScheme:
        """The scheme's entry, or an error with the nearest names."""
        if name not in self.schemes:
            raise unknown("scheme", name, self.schemes)
        return self.schemes[name]

    def task(self, name: str) -> PerplexityTask | PasskeyTask | RulerTask | LongBenchTask:
        """The task's entry, or an error with the nearest names."""
        if name not in self.tasks:
            raise unknown("task", name, self.tasks)
        return self.tasks[name]

    def _chosen(self, scheme: str) -> bool:
        return scheme in (self.evaluation.schemes or self.schemes)

    def evaluates(self, scheme: str, task: str) -> bool:
        """Whether a scheme is evaluated on a task: chosen, and able to run its protocol."""
        if not self._chosen(scheme) or task not in self.evaluation.tasks.get(scheme, [task]):
            return False
        spec = self.task(task)
        protocol = spec.protocol if isinstance(spec, PerplexityTask) else "A"
        return protocol in self.scheme(scheme).protocols

    def eval_cells(self) -> list[tuple[str, str]]:
        """(scheme, task) of every evaluation job of a model."""
        return [(s, t) for s in self.schemes for t in self.tasks if self.evaluates(s, t)]

    def timed_schemes(self, spec: TimingSpec | EnergySpec) -> list[str]:
        """The schemes measured by `spec`, without the baseline, which every job measures too."""
        return [s for s in (spec.schemes or self.schemes) if s != self.baseline]

    def _cells(self, spec: TimingSpec | EnergySpec) -> list[tuple[str, str, int]]:
        timed = self.timed_schemes(spec)
        return [
            (scheme, name, rep)
            for name, workload in spec.workloads.items()
            for scheme in timed
            if not workload.schemes or scheme in workload.schemes
            for rep in range(spec.reps)
        ]

    def throughput_cells(self) -> list[tuple[str, str, int]]:
        """(scheme, workload, rep) of every throughput job of a model."""
        return self._cells(self.throughput)

    def energy_cells(self) -> list[tuple[str, str, int]]:
        """(scheme, workload, rep) of every energy job of a model."""
        return self._cells(self.energy)

    def append_reps(self) -> int:
        """Returns the number of append jobs; 0 without that measurement."""
        return self.append.reps if self.append else 0

    def append_schemes(self) -> list[str]:
        """Schemes of the append measurement; empty without one."""
        if self.append is None:
            return []
        chosen = self.append.schemes or [self.baseline, self.headline]
        return [s for s in dict.fromkeys(chosen) if s in self.schemes]

    def kernel_cases(self) -> dict[str, KernelCase]:
        """Cases of the kernel benchmark; none without one."""
        return self.kernels.cases if self.kernels else {}

    def datasets(self) -> list[str]:
        """Every data set that calibration or a task needs."""
        found = {task_dataset(task) for task in self.tasks.values()} | {self.calibration.dataset}
        return sorted(name for name in found if name is not None)


def digest(*specs: BaseModel | dict[str, Any] | list[Any] | str | int | None) -> str:
    """A short, stable digest of specifications (sha256 of their canonical JSON, 16 digits)."""
    plain = [s.model_dump(mode="json") if isinstance(s, BaseModel) else s for s in specs]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_study(raw: Any, where: str = "config") -> Study:
    """Validates a plain mapping; raises :class:`UserError` with one line per wrong field."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a mapping of keys, got {type(raw).__name__}")
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            tags = {*KINDS, "perplexity", "passkey", "ruler", "longbench"}
            tagged = item["loc"][:1] in (("schemes",), ("tasks",))  # their third part is the kind
            path = ".".join(
                str(p) for i, p in enumerate(item["loc"]) if not (tagged and i == 2 and p in tags)
            )
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "lossy":
                path = ".".join(filter(None, (path, str(item["ctx"]["field"]))))
            if not path:  # of the study as a whole, a line a problem
                lines += [f"{where}: {line}" for line in message.splitlines()]
                continue
            if item["type"] == "extra_forbidden":
                message = (
                    f"unknown key; known keys: {', '.join(sorted(Study.model_fields))}"
                    if (len(item["loc"]) == 1)
                    else "unknown key"
                )
            given = item.get("input")
            shown = f" (got {given!r})" if isinstance(given, str | int | float) else ""
            lines.append(f"{where}: {path + ': ' if path else ''}{message}{shown}")
        raise UserError("\n".join(lines)) from None


def load_study(path: str | Path) -> Study:
    """Reads a study from YAML or JSON."""
    return parse_study(read_study(path), where=str(path))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a study file, as committed in config/schema.json.

    A file with a `base` need not hold the keys that a study requires.
    """
    schema = Study.model_json_schema()
    text = "study file that this one is a variant of, relative to its folder; see config/README.md"
    schema["properties"]["base"] = {"type": "string", "title": "Base", "description": text}
    return schema | {"if": {"required": ["base"]}, "else": {"required": schema.pop("required")}}
