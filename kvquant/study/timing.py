"""The study's sections `throughput:` and `energy:`, without torch."""

from __future__ import annotations

from pydantic import Field

from kvquant.study.limits import MAX_BATCH, MAX_REPS, MAX_ROUNDS, MAX_SECONDS, MAX_TOKENS
from kvquant.study.strict import Strict


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
