"""The study: every key a config file may hold, typed and validated, without importing torch.

The YAML files under ``config/`` are instances of :class:`Study`; the Snakefile and the CLI both
read them through :func:`load_study`, and ``config/schema.json`` is exported from the same classes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from kvquant.config_append import AppendSpec
from kvquant.config_kernels import KernelCase as KernelCase
from kvquant.config_kernels import KernelsSpec as KernelsSpec
from kvquant.config_models import CHAT_OPTIONS as CHAT_OPTIONS
from kvquant.config_models import ModelSpec as ModelSpec
from kvquant.config_paths import NAME, DeviceKey, PathVars
from kvquant.config_schemes import KINDS, MAX_SEED, AnyScheme, CalibratedScheme, SchemeSpec, Strict
from kvquant.config_schemes import Fp8Scheme as Fp8Scheme
from kvquant.config_schemes import Fp16Scheme as Fp16Scheme
from kvquant.config_schemes import Fp16StaticScheme as Fp16StaticScheme
from kvquant.config_schemes import HfFp8Scheme as HfFp8Scheme
from kvquant.config_schemes import HfHqqScheme as HfHqqScheme
from kvquant.config_schemes import HfQuantoScheme as HfQuantoScheme
from kvquant.config_schemes import Int4HadamardScheme as Int4HadamardScheme
from kvquant.config_schemes import KiviScheme as KiviScheme
from kvquant.config_schemes import KvquantRefScheme as KvquantRefScheme
from kvquant.config_schemes import NuqScheme as NuqScheme
from kvquant.config_schemes import TurboQuantScheme as TurboQuantScheme
from kvquant.config_statistics import Margin as Margin
from kvquant.config_statistics import StatisticsSpec as StatisticsSpec
from kvquant.config_tasks import LONGBENCH_TASKS as LONGBENCH_TASKS
from kvquant.config_tasks import RULER_TASKS as RULER_TASKS
from kvquant.config_tasks import EvaluationSpec as EvaluationSpec
from kvquant.config_tasks import LongBenchTask as LongBenchTask
from kvquant.config_tasks import PasskeyTask as PasskeyTask
from kvquant.config_tasks import PerplexityTask as PerplexityTask
from kvquant.config_tasks import RulerTask as RulerTask
from kvquant.config_tasks import TaskSpec as TaskSpec
from kvquant.config_tasks import task_dataset as task_dataset
from kvquant.errors import UserError, unknown
from kvquant.files import read_text


class CalibrationSpec(Strict):
    """The text and the statistics from which non-uniform codebooks are built."""

    dataset: str = "essays"
    windows: int = Field(16, ge=1, description="number of calibration windows")
    window: int = Field(2048, ge=32, description="tokens in a window")
    seed: int = Field(0, ge=0, le=MAX_SEED)
    sinks: int = Field(1, ge=0, description="first tokens of a window that are left out")
    bins: int = Field(1024, ge=64, multiple_of=4, description="histogram bins per key channel")
    outlier_fractions: list[float] = Field(
        [0.0, 0.01, 0.02], description="value outlier fractions that schemes may use"
    )


class Workload(Strict):
    """One throughput or energy workload."""

    prompt: int = Field(ge=1, description="tokens of the longest prompt")
    batch_size: int = Field(1, ge=1)
    answer: int = Field(16, ge=0, description="decoded tokens")
    ragged: bool = Field(False, description="prompt lengths fall evenly to half of `prompt`")
    schemes: list[str] = Field(
        default_factory=list, description="empty: all that the stage measures"
    )


class TimingSpec(Strict):
    """How long and how often a workload is timed."""

    workloads: dict[str, Workload] = Field(default_factory=dict)
    schemes: list[str] = Field(default_factory=list, description="empty: all schemes of the study")
    reps: int = Field(1, ge=1, description="independent jobs per cell")
    warmup: int = Field(5, ge=0)
    iterations: int = Field(100, ge=1)
    max_seconds: float = Field(120.0, gt=0, description="stop after this long (at least 5 rounds)")


class EnergySpec(Strict):
    """How energy is measured: trials of at least `seconds`, interleaved with the baseline."""

    workloads: dict[str, Workload] = Field(default_factory=dict)
    schemes: list[str] = Field(default_factory=list, description="empty: all schemes of the study")
    reps: int = Field(1, ge=1)
    trials: int = Field(5, ge=1)
    seconds: float = Field(5.0, gt=0)
    idle_seconds: float = Field(5.0, ge=0)
    country: str = Field("POL", description="ISO code for CodeCarbon's offline carbon intensity")


class Study(Strict):
    """A complete study; one YAML file under config/."""

    study: str
    title: str = ""
    device: DeviceKey = Field(
        "auto", description="name in perf and energy paths; 'auto' asks the GPU"
    )
    gpus: int = Field(0, ge=0, description="GPUs of a throughput or energy job; 0: CPU study")
    protect: bool = Field(False, description="write-protect measured results")
    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1)
    baseline: str = "fp16"
    headline: str = Field("nuq3-1pct", description="the scheme whose claims are made")
    data_dir: str | None = None
    models: dict[str, ModelSpec]
    calibration: CalibrationSpec = CalibrationSpec()
    schemes: dict[str, SchemeSpec]
    tasks: dict[str, TaskSpec]
    evaluation: EvaluationSpec = EvaluationSpec()
    throughput: TimingSpec = TimingSpec()
    energy: EnergySpec = EnergySpec()
    append: AppendSpec | None = Field(None, description="absent: not measured")
    kernels: KernelsSpec | None = Field(None, description="absent: not measured")
    statistics: StatisticsSpec = StatisticsSpec()
    pathvars: PathVars = Field(default_factory=dict, description="results, paper, logs, cache")

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        groups: dict[str, Any] = {
            "models": self.models,
            "schemes": self.schemes,
            "tasks": self.tasks,
            "throughput.workloads": self.throughput.workloads,
            "energy.workloads": self.energy.workloads,
            "kernels.cases": self.kernel_cases(),
            "study": [self.study],
        }
        for field, names in groups.items():
            for name in names:
                if not NAME.fullmatch(name):
                    raise ValueError(f"{field}: '{name}' must be kebab case ({NAME.pattern})")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds: must be distinct and not negative")
        if self.baseline not in self.schemes:
            raise ValueError(f"baseline: '{self.baseline}' is not among the schemes")
        for name, task in self.tasks.items():
            if isinstance(task, RulerTask | LongBenchTask):
                known = RULER_TASKS if isinstance(task, RulerTask) else LONGBENCH_TASKS
                if task.task not in known:
                    reason = unknown(f"{task.suite} task", task.task, known)
                    raise ValueError(f"tasks.{name}.task: {reason}")
        appended = self.append.schemes if self.append else []
        for name in appended:
            if name not in self.schemes:
                raise ValueError(f"append.schemes: '{name}' is not among the schemes")
        for label, case in self.kernel_cases().items():
            for name in case.peers:
                if name not in self.schemes or name in (self.baseline, self.headline):
                    what = "measured anyway" if name in self.schemes else "not among the schemes"
                    raise ValueError(f"kernels.cases.{label}.peers: '{name}' is {what}")
        for field, chosen in (("throughput", self.throughput), ("energy", self.energy)):
            named = [(f"{field}.schemes", name) for name in chosen.schemes]
            for label, workload in chosen.workloads.items():
                named += [(f"{field}.workloads.{label}.schemes", n) for n in workload.schemes]
            for where, name in named:
                if name not in self.schemes:
                    raise ValueError(f"{where}: '{name}' is not among the schemes")
        for name in self.evaluation.schemes:
            if name not in self.schemes:
                raise ValueError(f"evaluation.schemes: '{name}' is not among the schemes")
        if self.evaluation.schemes and self.baseline not in self.evaluation.schemes:
            raise ValueError(f"evaluation.schemes: the baseline '{self.baseline}' is missing")
        for name, limited in self.evaluation.tasks.items():
            if not self._chosen(name):
                raise ValueError(f"evaluation.tasks: '{name}' is not among the evaluated schemes")
            if name == self.baseline:
                raise ValueError(
                    f"evaluation.tasks: the baseline '{name}' runs all tasks; remove its line"
                )
            for wanted in limited:
                if wanted not in self.tasks:
                    reason = unknown("task", wanted, self.tasks)
                    raise ValueError(f"evaluation.tasks.{name}: {reason}")
        fractions = self.calibration.outlier_fractions
        for name, scheme in self.schemes.items():
            if isinstance(scheme, CalibratedScheme) and scheme.outliers not in fractions:
                raise ValueError(
                    f"schemes.{name}.outliers: {scheme.outliers} is not in "
                    f"calibration.outlier_fractions {fractions}; add it there"
                )
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
    file = Path(path)
    text = read_text(file, "--study")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from None
    return parse_study(raw, where=str(file))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a study file, as committed in config/schema.json."""
    return Study.model_json_schema()
