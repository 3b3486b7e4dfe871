"""The study's optional section `jobs:`, without torch; part of :mod:`kvquant.study.config`.

A job is what a user waits for: prompts and their answers. Its cases say how long they are, how much
memory there is and which caches take turns; each cache serves as many prompts at once as fit.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvquant.study.kernels import SHAPES, ShapeName
from kvquant.study.limits import MAX_BATCH, MAX_MINUTES, MAX_ROUNDS, MAX_SECONDS, MAX_TOKENS
from kvquant.study.strict import Strict

# Tokens per call of the model in the search of the longest prompt: a long prompt in one call needs
# memory for its activations, which grow with it as the cache does.
CONTEXT_CHUNK = 4096
# What a search of what fits found: tokens of prompts beside one another, and of a single one.
SEARCHED = ("capacity_tokens", "context_tokens")
# What GPUs have of a model: some layers with all heads, or some kv heads of all layers.
Split = Literal["layers", "heads"]


class JobCase(Strict):
    """Settings of one case: a model of random weights, prompts, answers and the caches."""

    later: ClassVar[tuple[str, ...]] = ("context", "gpus", "split")
    shape: ShapeName = Field(description="dimensions of the model")
    prompt: int = Field(ge=1, le=MAX_TOKENS, description="tokens per prompt")
    answer: int = Field(ge=1, le=MAX_TOKENS, description="decoded tokens per prompt")
    batch_size: int | None = Field(
        None, ge=1, le=MAX_BATCH, description="prompts per job; absent: as many as fit"
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        le=MAX_BATCH,
        description="memory of each GPU in GB that a job may use, which emulates smaller cards; "
        "absent: all of it",
    )
    gpus: int | None = Field(
        None,
        ge=1,
        le=64,
        description="GPUs that have the model, as `split` says; absent: one",
    )
    split: Split = Field(
        "layers",
        description="what each GPU has: some layers, evenly by bytes, in one process; or some kv "
        "heads of all layers, in a process of its own (tensor parallelism)",
    )
    decode: Literal["fastest", "generate"] = Field(
        "fastest",
        description="how answers are decoded: each cache in its fastest way, or all by "
        "transformers' generate",
    )
    schemes: list[str] = Field(min_length=1, description="caches that take turns")
    capacity: bool = Field(
        False, description="whether to search how many tokens of such prompts fit"
    )
    context: bool = Field(
        False,
        description="whether to search the longest single prompt that fits, prefilled in calls of "
        f"{CONTEXT_CHUNK:,} tokens",
    )
    energy: bool = Field(False, description="whether to measure the GPU's energy")
    trials: int = Field(3, ge=1, le=MAX_ROUNDS, description="jobs per cache, in turns")

    @property
    def num_gpus(self) -> int:
        """Returns the number of GPUs that the model is spread over."""
        return self.gpus or 1

    @property
    def num_processes(self) -> int:
        """Returns the number of processes that run the case."""
        return self.num_gpus if self.split == "heads" else 1

    @property
    def given_prompts(self) -> bool:
        """Returns whether every cache runs the same prompts in all memory, in its fastest way.

        Its fastest way may be a CUDA graph, which needs all layers on one GPU.
        """
        whole = self.memory_gb is None and self.num_gpus == 1
        return self.batch_size is not None and whole and self.decode == "fastest"

    @model_validator(mode="after")
    def _agrees(self) -> JobCase:
        if len(set(self.schemes)) != len(self.schemes):
            raise ValueError("schemes: an entry is given twice")
        layers = SHAPES[self.shape]["num_hidden_layers"]
        if self.split == "layers" and self.num_gpus > layers:
            raise ValueError(f"gpus: at most one per layer, and '{self.shape}' has {layers}")
        heads = SHAPES[self.shape]["num_key_value_heads"]
        if self.split == "heads" and (self.num_gpus == 1 or heads % self.num_gpus):
            fitting = " or ".join(str(n) for n in range(2, heads + 1) if not heads % n)
            raise ValueError(
                f"gpus: {self.num_gpus} cannot share the {heads} kv heads of '{self.shape}' evenly "
                f"(split: heads); give {fitting or 'another shape'}"
            )
        return self


class JobsSpec(Strict):
    """Settings of whole jobs: prefill and answers of models with random weights."""

    cases: dict[str, JobCase] = Field(min_length=1, description="cases by name, one job each")
    seconds: float = Field(
        5.0,
        gt=0,
        le=MAX_SECONDS,
        description="length of the shortest trial with energy; jobs are repeated until then",
    )
    slow_seconds: float = Field(
        30.0, gt=0, le=MAX_SECONDS, description="a cache whose job takes longer runs one trial"
    )
    idle_seconds: float = Field(
        5.0, ge=0, le=MAX_SECONDS, description="seconds for which idle power is measured"
    )
    country: str = Field("POL", description="ISO code for CodeCarbon's offline carbon intensity")
    minutes: int = Field(30, ge=1, le=MAX_MINUTES, description="expected run time of a case")
