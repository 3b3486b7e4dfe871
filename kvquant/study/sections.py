"""All sections of a study file, each typed and validated by itself.

Keys at the top of the file are the fields of :class:`StudySections`. What the sections say of each
other is checked in :mod:`kvquant.study.checks`.
"""

from __future__ import annotations

from pydantic import Field

from kvquant.errors import unknown
from kvquant.study.append import AppendSpec
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.kernels import KernelCase, KernelsSpec
from kvquant.study.limits import MAX_NAMES
from kvquant.study.models import ModelSpec
from kvquant.study.paths import DeviceKey, PathVars
from kvquant.study.scheme_kinds import Scheme
from kvquant.study.schemes import SchemeSpec
from kvquant.study.statistics import StatisticsSpec
from kvquant.study.strict import Strict
from kvquant.study.tasks import EvaluationSpec, TaskSpec
from kvquant.study.timing import EnergySpec, TimingSpec


class StudySections(Strict):
    """The keys of a study file, and what is found in a study by name."""

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

    def model(self, name: str) -> ModelSpec:
        """The model's entry, or an error with the nearest names."""
        if name not in self.models:
            raise unknown("model", name, self.models)
        return self.models[name]

    def scheme(self, name: str) -> Scheme:
        """The scheme's entry, or an error with the nearest names."""
        if name not in self.schemes:
            raise unknown("scheme", name, self.schemes)
        return self.schemes[name]

    def task(self, name: str) -> TaskSpec:
        """The task's entry, or an error with the nearest names."""
        if name not in self.tasks:
            raise unknown("task", name, self.tasks)
        return self.tasks[name]

    def timed_schemes(self, spec: TimingSpec | EnergySpec) -> list[str]:
        """The schemes measured by `spec`, without the baseline, which every job measures too."""
        return [s for s in (spec.schemes or self.schemes) if s != self.baseline]

    def kernel_cases(self) -> dict[str, KernelCase]:
        """Cases of the kernel benchmark; none without one."""
        return self.kernels.cases if self.kernels else {}
