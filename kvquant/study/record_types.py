"""What a job leaves behind: typed records, which :mod:`kvquant.study.records` writes and reads.

Types are strict: a number in quotes, NaN and a field that nobody knows are refused, also when a
record is made.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvquant.study.kernels import Measure

SCHEMA_VERSION = 2


class Strict(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Record(Strict):
    """What all records have in common."""

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
    """Accuracy of one (model, scheme, task, seed): ``run.json``."""

    kind: Literal["eval"] = "eval"
    model: str
    scheme: str
    task: str
    seed: int
    suite: str
    protocol: Literal["A", "B"]
    metric: str = Field(description="name of the metric that statistics use")
    higher_is_better: bool
    value: float = Field(description="the metric over all samples of this seed")
    metrics: dict[str, float] = Field(description="every metric, the named one included")
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
    """Over `n` rounds; milliseconds unless the field says otherwise."""

    median: float
    p10: float
    p90: float
    p99: float
    n: int


class PerfSide(Strict):
    """One scheme's side of an interleaved throughput job."""

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
    """Latency of one (device, model, scheme, workload, rep), interleaved with the baseline."""

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
    """One scheme's side of an interleaved energy job; a list holds one value a trial."""

    scheme: str
    joules: list[float]
    joules_above_idle: list[float]
    seconds: list[float]
    tokens: list[int]
    joules_per_token: float
    joules_per_token_above_idle: float


class EnergyRecord(Record):
    """Energy of one (device, model, scheme, workload, rep), interleaved with the baseline."""

    kind: Literal["energy"] = "energy"
    device: str
    model: str
    scheme: str
    workload: str
    rep: int
    source: Literal["nvml", "estimated"]
    method: str = Field(description="which counter or model of power gave the numbers")
    idle_watts: float
    scheme_side: EnergySide
    baseline_side: EnergySide
    energy_ratio: float = Field(description="scheme over baseline joules per token")
    carbon: dict[str, Any] = Field(default_factory=dict, description="CodeCarbon bookkeeping")
    telemetry: dict[str, Any] = Field(default_factory=dict, description="clocks, temperature")


class AppendPoint(Strict):
    """One cache at one size, appended to `chunk` tokens a call."""

    series: str = Field(description="scheme, or 'concatenation'")
    chunk: int = Field(description="tokens a sequence and call")
    tokens: int = Field(description="tokens a sequence held before the timed calls")
    status: Literal["ok", "oom"]
    token_ms: Percentiles | None = Field(
        None, description="a token's share of a round, which fills whole blocks"
    )
    call_ms: Percentiles | None = Field(None, description="single calls")
    cache_bytes: int | None = Field(None, description="bytes held after the timed calls")


class AppendRecord(Record):
    """Cost of appending to one layer's cache as it grows, all series in turns in one process."""

    kind: Literal["append"] = "append"
    device: str
    rep: int
    batch_size: int
    kv_heads: int
    head_dim: int
    round_tokens: dict[str, int] = Field(description="tokens a sequence gets in a round, by chunk")
    points: list[AppendPoint]


class KernelSide(Strict):
    """One side of an interleaved measurement."""

    side: str = Field(description="a scheme, 'copy', or a backend of torch's fp16 attention")
    role: Literal["ours", "copy", "fp16", "peer"]
    status: Literal["ok", "oom", "not installed", "refused", "failed"]
    reason: str = Field("", description="why there is no time")
    ms: Percentiles | None = None
    over_ours: Percentiles | None = Field(
        None, description="its time over ours in the same round, no unit; above 1 ours is faster"
    )
    nbytes: int | None = Field(None, description="bytes that it has to read and write")
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
    """One measurement of a case: sides in turns in one process."""

    measure: Measure
    copy_gb_per_s: float | None = Field(
        None, description="read and written by a copy on the device, timed in the same rounds"
    )
    sides: list[KernelSide]


class KernelRecord(Record):
    """Kernels of the headline scheme at one shape."""

    kind: Literal["kernels"] = "kernels"
    device: str
    case: str
    shape: str
    scheme: str
    batch: int
    tokens: int = Field(description="of the longest sequence")
    all_tokens: int = Field(description="of all sequences in prefill, steps and layer-step")
    parts: list[KernelPart]
    seconds: float = Field(description="wall time of the case; not part of any table")
