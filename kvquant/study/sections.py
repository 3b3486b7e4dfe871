"""The sections of a study file, each typed and validated by itself.

The keys at the top of the file are the fields of :class:`StudySections`. Whether the sections agree
with each other is checked in :mod:`kvquant.study.checks`.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kvquant.errors import unknown
from kvquant.study.append import AppendSpec
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.jobs import JobCase, JobsSpec
from kvquant.study.kernels import KernelCase, KernelsSpec
from kvquant.study.limits import MAX_COUNTRIES, MAX_NAMES
from kvquant.study.models import ModelSpec
from kvquant.study.own_texts import OwnText
from kvquant.study.paths import DeviceKey, MaybePath, PathVars, PlainPath
from kvquant.study.reproduce import ReproduceSpec
from kvquant.study.scheme_kinds import PROMPT_ATTENTION, CalibratedScheme, Scheme
from kvquant.study.schemes import SchemeSpec
from kvquant.study.statistics import StatisticsSpec
from kvquant.study.strict import Strict
from kvquant.study.tasks import EvaluationSpec, TaskSpec
from kvquant.study.timing import EnergySpec, TimedStage, TimingSpec
from kvquant.study.tracking import TrackingSpec


class StudySections(Strict):
    """The sections of a study file, and look-ups by name."""

    later: ClassVar[tuple[str, ...]] = (
        "tracking",
        "calibrations",
        "countries",
        "datasets",
        "companions",
        "reproduce",
    )
    study: str = Field(description="short name in kebab case")
    title: str = Field("", description="heading of the report and the paper")
    device: DeviceKey = Field(
        "auto", description="name in paths of throughput and energy results; 'auto' asks the GPU"
    )
    gpus: int = Field(
        0, ge=0, le=64, description="GPUs per throughput or energy job; 0 makes it a CPU study"
    )
    protect: bool = Field(False, description="write-protect measured results")
    seeds: list[int] = Field(
        [0, 1, 2, 3, 4],
        min_length=1,
        max_length=MAX_NAMES,
        description="each seed chooses its own samples or window offsets",
    )
    baseline: str = Field("fp16", description="the scheme that all others are compared with")
    headline: str = Field("nuq3-1pct", description="the scheme that the claims are about")
    data_dir: str | None = Field(
        None, description="folder of local data sets; without it the hub is asked"
    )
    published: MaybePath = Field(
        None,
        description="folder of published records (`kvquant publish`): what they hold is not "
        "measured again; absent or null: none",
    )
    companions: dict[str, PlainPath] = Field(
        {},
        max_length=MAX_NAMES,
        description="study files by name, of whose published records the paper shows numbers, "
        "tables and figures as well",
    )
    models: dict[str, ModelSpec] = Field(description="models by name")
    datasets: dict[str, OwnText] = Field(
        {}, description="own texts and prompts by name, which calibrations and tasks read"
    )
    calibration: CalibrationSpec = Field(
        CalibrationSpec(), description="text and statistics that calibrated schemes are built from"
    )
    calibrations: dict[str, CalibrationSpec] = Field(
        default_factory=dict,
        description="further calibrations by name, which schemes choose by `calibration`",
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
    countries: list[str] = Field(
        ["POL", "FRA", "USA"],
        max_length=MAX_COUNTRIES,
        description="ISO codes of countries for which tables of energy show grams of CO2e as well, "
        "by CodeCarbon's offline carbon intensity; changes no result",
    )
    append: AppendSpec | None = Field(
        None, description="time per appended token as the cache grows; absent: not measured"
    )
    kernels: KernelsSpec | None = Field(
        None, description="cases of the kernel benchmark; absent: not measured"
    )
    jobs: JobsSpec | None = Field(
        None, description="whole jobs of models with random weights; absent: not measured"
    )
    statistics: StatisticsSpec = Field(
        StatisticsSpec(), description="how schemes are compared with the baseline"
    )
    tracking: TrackingSpec | None = Field(
        None, description="log every record to a tracker as well; absent: none"
    )
    reproduce: ReproduceSpec | None = Field(
        None,
        description="measure published results again and compare (target `reproduce`); absent: no",
    )
    pathvars: PathVars = Field(
        default_factory=dict,
        description="folders of the workflow by name: results, paper, logs, cache",
    )

    def model(self, name: str) -> ModelSpec:
        """Returns the entry of a model; an unknown name is refused with the nearest known ones."""
        if name not in self.models:
            raise unknown("model", name, self.models)
        return self.models[name]

    def scheme(self, name: str) -> Scheme:
        """Returns the entry of a scheme; an unknown name is refused with the nearest known ones."""
        if name not in self.schemes:
            raise unknown("scheme", name, self.schemes)
        return self.schemes[name]

    def task(self, name: str) -> TaskSpec:
        """Returns the entry of a task; an unknown name is refused with the nearest known ones."""
        if name not in self.tasks:
            raise unknown("task", name, self.tasks)
        return self.tasks[name]

    def calibration_name(self, scheme: str) -> str | None:
        """Returns the entry of `calibrations` that a scheme is built from; None: `calibration`."""
        spec = self.scheme(scheme)
        return spec.calibration if isinstance(spec, CalibratedScheme) else None

    def sixteen_bit_twin(self, scheme: str) -> str | None:
        """Returns the scheme that differs in the attention of prompts alone, with it in 16 bits.

        None for a scheme with 16-bit attention, and where there is no such scheme.
        """
        if self.scheme(scheme).prompt_attention == "16-bit":
            return None

        def rest(name: str) -> object:
            plain = self.scheme(name).model_copy(update={PROMPT_ATTENTION: "16-bit"})
            return plain.kind, plain.meaning(), self.calibration_name(name)

        plain = (n for n, s in self.schemes.items() if s.prompt_attention == "16-bit")
        return next((name for name in plain if rest(name) == rest(scheme)), None)

    def calibrated_by(self, name: str | None) -> CalibrationSpec:
        """Returns an entry of `calibrations`, or for None the study's `calibration`."""
        if name is None:
            return self.calibration
        if name not in self.calibrations:
            raise unknown("calibration", name, self.calibrations)
        return self.calibrations[name]

    def used_calibrations(self) -> list[str | None]:
        """Returns the calibrations that schemes are built from, in the order of the schemes."""
        calibrated = [s for s in self.schemes.values() if isinstance(s, CalibratedScheme)]
        return list(dict.fromkeys(scheme.calibration for scheme in calibrated))

    def sampled_tokens(self, calibration: str | None = None) -> int:
        """Returns how many whole tokens per layer a calibration keeps for its schemes, maybe 0."""
        calibrated = [s for s in self.schemes.values() if isinstance(s, CalibratedScheme)]
        asked = (s.sampled_tokens for s in calibrated if s.calibration == calibration)
        return max(asked, default=0)

    def keys_after_rope(self, calibration: str | None = None) -> bool:
        """Returns whether a calibration keeps histograms of keys after RoPE for its schemes."""
        calibrated = [s for s in self.schemes.values() if isinstance(s, CalibratedScheme)]
        return any(s.keys_after_rope for s in calibrated if s.calibration == calibration)

    def holds_prompts(self, dataset: str) -> bool:
        """Returns whether a data set is one of prompts, because a task asks them."""
        asking = (task.dataset_name() for task in self.tasks.values() if task.own_prompts)
        return dataset in asking

    def timed_schemes(self, spec: TimedStage) -> list[str]:
        """Returns the schemes that `spec` measures, without the baseline of every job."""
        return [s for s in (spec.schemes or self.schemes) if s != self.baseline]

    def kernel_scheme(self, case: KernelCase) -> str:
        """Returns the name of the scheme whose kernels a case measures."""
        return case.scheme or self.headline

    def kernel_cases(self) -> dict[str, KernelCase]:
        """Returns the cases of the kernel benchmark; empty where kernels are not measured."""
        return self.kernels.cases if self.kernels else {}

    def job_cases(self) -> dict[str, JobCase]:
        """Returns the cases of whole jobs; empty where they are not measured."""
        return self.jobs.cases if self.jobs else {}
