"""The study's sections `throughput:` and `energy:`, with their workloads."""

from __future__ import annotations

from pydantic import Field

from kvquant.study.limits import MAX_BATCH, MAX_REPS, MAX_ROUNDS, MAX_SECONDS, MAX_TOKENS
from kvquant.study.strict import Strict
from kvquant.study.wording import Named, short_count


class Workload(Named):
    """A workload of throughput or energy: prompts of given lengths, and answers."""

    prompt: int = Field(ge=1, le=MAX_TOKENS, description="tokens of the longest prompt")
    batch_size: int = Field(1, ge=1, le=MAX_BATCH, description="prompts per batch")
    answer: int = Field(16, ge=0, le=MAX_TOKENS, description="decoded tokens per prompt")
    ragged: bool = Field(
        False, description="whether prompt lengths fall evenly from `prompt` to half of it"
    )
    schemes: list[str] = Field(
        default_factory=list,
        description="schemes that run the workload; empty: all that the stage measures",
    )

    def title(self, key: str) -> str:
        """Returns batch, lengths and answers."""
        prompts = f"{self.batch_size} \N{MULTIPLICATION SIGN} {short_count(self.prompt)} tokens"
        answers = [f"{short_count(self.answer)} new"] if self.answer else []
        return ", ".join([prompts, *(["ragged"] if self.ragged else []), *answers])

    def telling(self) -> list[str]:
        """Returns the options that may tell workloads of one title apart."""
        told = {"prompt", "batch_size", "answer", "ragged", "schemes"}
        return [option for option in super().telling() if option not in told]


class TimedStage(Strict):
    """What is measured in a stage of timed jobs, and how often."""

    workloads: dict[str, Workload] = Field(
        default_factory=dict, description="workloads by name; none: the stage is not measured"
    )
    schemes: list[str] = Field(
        default_factory=list,
        description="schemes that are measured; empty: all schemes of the study",
    )
    reps: int = Field(1, ge=1, le=MAX_REPS, description="independent jobs per scheme and workload")


class TimingSpec(TimedStage):
    """How long and how often a workload is timed."""

    warmup: int = Field(5, ge=0, le=MAX_ROUNDS, description="untimed rounds before the timed ones")
    iterations: int = Field(100, ge=1, le=MAX_ROUNDS, description="maximum number of timed rounds")
    max_seconds: float = Field(
        120.0,
        gt=0,
        le=MAX_SECONDS,
        description="time in seconds after which no further round begins, once 5 are timed",
    )


class EnergySpec(TimedStage):
    """How energy is measured, in trials of at least `seconds` interleaved with the baseline."""

    trials: int = Field(
        5, ge=1, le=MAX_ROUNDS, description="trials per scheme, in turns with the baseline"
    )
    seconds: float = Field(
        5.0,
        gt=0,
        le=MAX_SECONDS,
        description="length of the shortest trial; at least 5 s on a GPU, as its counter needs",
    )
    idle_seconds: float = Field(
        5.0,
        ge=0,
        le=MAX_SECONDS,
        description="seconds for which idle power is measured before the trials",
    )
    country: str = Field("POL", description="ISO code for CodeCarbon's offline carbon intensity")
