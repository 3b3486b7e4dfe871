"""Typed records of finished jobs, which :mod:`kvquant.study.records` writes and reads.

Types are strict: a number in quotes, NaN and an unknown field are refused, also when a record is
created.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from kvquant.study.jobs import Split
from kvquant.study.kernels import Measure
from kvquant.study.scheme_kinds import PromptAttention
from kvquant.study.strict import without_defaults

SCHEMA_VERSION = 2


class Strict(BaseModel):
    """Base of records and their parts, which refuses unknown fields and non-finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # Fields that were added after records had been published. They are not written at their
    # default, so that a record reads and is sealed as it was.
    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, plain(self))


class Record(Strict):
    """Base of all records, with their common fields."""

    schema_version: Literal[2] = 2
    study: str
    spec_digest: str = Field(description="digest of the specs that this result depends on")
    environment: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(
        default_factory=dict,
        description="hashes of the files that the result depends on, by what they are: model, "
        "quantizer, statistics, prompts, text",
    )
    seal: str = Field("", description="hash of all other fields (kvquant.formats.sealing)")


class EvalRecord(Record):
    """Holds the accuracy of one (model, scheme, task, seed), the content of ``run.json``."""

    later: ClassVar[tuple[str, ...]] = ("prompt_attention",)
    kind: Literal["eval"] = "eval"
    model: str
    scheme: str
    task: str
    seed: int
    suite: str
    protocol: Literal["A", "B"]
    prompt_attention: PromptAttention = Field(
        "16-bit", description="in how many bits prompts attended, whatever the cache is"
    )
    metric: str = Field(description="name of the metric that statistics use")
    higher_is_better: bool
    value: float = Field(description="the metric over all samples of this seed")
    metrics: dict[str, float] = Field(description="all metrics, including `metric`")
    samples: int
    tokens: int = Field(description="prompt or text tokens that went through the cache")
    cache_bytes: int = Field(description="bytes allocated by the cache, summed over samples")
    cache_elements: int = Field(description="key and value elements held by those bytes")
    bits_per_element: float
    samples_sha256: str
    prompts_sha256: str | None = Field(
        None, description="of the seed's prompts; None where a suite reads its text itself"
    )
    seconds: float = Field(
        description="wall time, shared equally by seeds measured together; not part of any table"
    )


class Percentiles(Strict):
    """Holds percentiles over `n` rounds, in milliseconds unless the field says otherwise."""

    median: float
    p10: float
    p90: float
    p99: float
    n: int


class PerfSide(Strict):
    """Holds one scheme's side of an interleaved throughput job."""

    scheme: str
    status: Literal["ok", "oom"]
    prefill_ms: Percentiles | None = None
    decode_ms: Percentiles | None = Field(None, description="one decode step")
    quantize_ms: Percentiles | None = Field(
        None, description="quantize and pack of the whole prompt, measured inside the prefill"
    )
    prefill_rounds_ms: list[float] | None = Field(None, description="each counted round")
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    peak_bytes: int | None = Field(None, description="peak memory of a prefill (GPU) or None")
    cache_bytes: int | None = None
    cache_elements: int | None = None
    bits_per_element: float | None = None


class ThroughputRecord(Record):
    """Holds latency of one (device, model, scheme, workload, rep) and of the baseline."""

    kind: Literal["throughput"] = "throughput"
    device: str
    model: str
    scheme: str
    workload: str
    rep: int
    prompt_tokens: int = Field(description="tokens of all prompts, padding not counted")
    batch_size: int
    scheme_side: PerfSide
    baseline_side: PerfSide
    prefill_ratio: float | None = Field(
        None, description="scheme over baseline prefill tokens/s, median of paired rounds"
    )
    quantize_share: float | None = Field(
        None, description="quantize+pack time over the baseline's prefill time"
    )


class EnergySide(Strict):
    """Holds one scheme's side of an interleaved energy job, with one list entry per trial."""

    scheme: str
    joules: list[float]
    joules_above_idle: list[float]
    seconds: list[float]
    tokens: list[int]
    joules_per_token: float
    joules_per_token_above_idle: float


class EnergyRecord(Record):
    """Holds energy of one (device, model, scheme, workload, rep) and of the baseline."""

    kind: Literal["energy"] = "energy"
    device: str
    model: str
    scheme: str
    workload: str
    rep: int
    source: Literal["nvml", "estimated"]
    method: str = Field(description="counter or power model behind the numbers")
    idle_watts: float
    scheme_side: EnergySide
    baseline_side: EnergySide
    energy_ratio: float = Field(description="scheme over baseline joules per token")
    carbon: dict[str, Any] = Field(default_factory=dict, description="CodeCarbon bookkeeping")
    telemetry: dict[str, Any] = Field(default_factory=dict, description="clocks, temperature")


class AppendPoint(Strict):
    """Holds the times of one cache at one size, to which each call appends `chunk` tokens."""

    series: str = Field(description="scheme, or 'concatenation'")
    chunk: int = Field(description="tokens per sequence and call")
    tokens: int = Field(description="tokens per sequence before the timed calls")
    status: Literal["ok", "oom"]
    token_ms: Percentiles | None = Field(
        None, description="a token's share of a round, which fills whole blocks"
    )
    call_ms: Percentiles | None = Field(None, description="single calls")
    cache_bytes: int | None = Field(None, description="bytes held after the timed calls")


class AppendRecord(Record):
    """Holds the cost of appending to one layer's cache as it grows, with all series in turns."""

    kind: Literal["append"] = "append"
    device: str
    rep: int
    batch_size: int
    kv_heads: int
    head_dim: int
    round_tokens: dict[str, int] = Field(description="tokens per sequence and round, by chunk")
    points: list[AppendPoint]


class KernelSide(Strict):
    """Holds one side of an interleaved measurement."""

    side: str = Field(description="a scheme, 'copy', or a backend of torch's fp16 attention")
    role: Literal["ours", "copy", "fp16", "peer"]
    status: Literal["ok", "oom", "not installed", "refused", "failed"]
    reason: str = Field("", description="why there is no time")
    ms: Percentiles | None = None
    over_ours: Percentiles | None = Field(
        None, description="its time over ours in the same round, no unit; above 1 ours is faster"
    )
    nbytes: int | None = Field(None, description="bytes that the side must read and write")
    gb_per_s: float | None = Field(None, description="those bytes over the median time")
    copy_share: float | None = Field(None, description="that rate over the rate of a device copy")
    floor_ms: float | None = Field(None, description="those bytes at the rate of a device copy")
    slots_per_element: float | None = Field(
        None,
        description="thread instructions that the GPU, at its highest clock, can issue in the "
        "median time for each key or value element and query head of its group",
    )
    cache_bytes: int | None = Field(None, description="bytes held by the cache after the prompts")
    bits_per_element: float | None = None


class KernelPart(Strict):
    """Holds one measurement of a case, whose sides ran in turns in one process."""

    measure: Measure
    copy_gb_per_s: float | None = Field(
        None, description="read and written by a copy on the device, timed in the same rounds"
    )
    sides: list[KernelSide]


class KernelRecord(Record):
    """Holds the measurements of the headline scheme's kernels at one shape."""

    kind: Literal["kernels"] = "kernels"
    device: str
    case: str
    shape: str
    scheme: str
    batch: int
    tokens: int = Field(description="tokens of the longest sequence")
    all_tokens: int = Field(description="tokens of all sequences in prefill, steps and layer-step")
    parts: list[KernelPart]
    seconds: float = Field(description="wall time of the case; not part of any table")


class JobTrial(Strict):
    """Holds one trial of a cache: one job, or as many as fill the shortest trial."""

    jobs: int
    prefill_seconds: float = Field(description="all prompts of all jobs of the trial")
    decode_seconds: float = Field(description="all answers, capture of a graph included")
    prefill_joules: float | None = None
    decode_joules: float | None = None


class JobSide(Strict):
    """Holds one cache's side of a case of whole jobs."""

    later: ClassVar[tuple[str, ...]] = ("gpu_peak_bytes",)
    scheme: str
    status: Literal["ok", "oom"]
    decoder: str = Field("", description="how answers were decoded: a CUDA graph, or from Python")
    batch_size: int | None = Field(None, description="prompts per job")
    capacity_tokens: int | None = Field(None, description="tokens that were held at once")
    context_tokens: int | None = Field(None, description="longest single prompt that was held")
    formula_tokens: int | None = Field(
        None, description="tokens that fit by the bytes per token of this cache"
    )
    trials: list[JobTrial] = Field(default_factory=list)
    first_token_ms: Percentiles | None = Field(None, description="of one prompt")
    step_ms: Percentiles | None = Field(None, description="one decode step of all prompts")
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    job_tokens_per_s: float | None = Field(None, description="prompt and answer tokens")
    peak_bytes: int | None = Field(
        None, description="largest allocation of a job on each GPU, with weights, summed"
    )
    gpu_peak_bytes: list[int] | None = Field(
        None, description="the same of each GPU, in their order; absent for one GPU"
    )
    steady_bytes: int | None = Field(None, description="held while answers are decoded")
    cache_bytes: int | None = None
    cache_elements: int | None = None
    bits_per_element: float | None = None
    joules_per_prompt_token: float | None = None
    joules_per_answer_token: float | None = None
    joules_per_token: float | None = Field(None, description="of the job, idle power included")
    joules_per_token_above_idle: float | None = None


class JobRecord(Record):
    """Holds a case of whole jobs, whose caches ran in turns in the same processes."""

    later: ClassVar[tuple[str, ...]] = ("split",)
    kind: Literal["jobs"] = "jobs"
    device: str
    case: str
    shape: str
    prompt: int
    answer: int
    gpus: int = Field(1, description="that have the model, as `split` says")
    split: Split = Field(
        "layers",
        description="what each GPU has: some layers, or some kv heads in a process of its own",
    )
    memory_bytes: int = Field(
        description="what torch may allocate on all GPUs of the case, weights included"
    )
    emulated: bool = Field(description="whether that is less than the GPU has")
    weight_bytes: int
    source: Literal["nvml", "estimated"] | None = Field(None, description="None: no energy")
    method: str = Field("", description="counter or power model behind the numbers")
    idle_watts: float | None = None
    counter_over_power: float | None = Field(
        None, description="energy by the counter over the integral of sampled power"
    )
    sides: list[JobSide]
    carbon: dict[str, Any] = Field(default_factory=dict, description="CodeCarbon bookkeeping")
    telemetry: dict[str, Any] = Field(default_factory=dict, description="clocks, temperature")
    seconds: float = Field(description="wall time of the case; not part of any table")
