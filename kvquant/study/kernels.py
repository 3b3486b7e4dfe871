"""The study's optional section `kernels:`, without torch; part of :mod:`kvquant.study.config`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvquant.study.limits import MAX_BATCH, MAX_MINUTES, MAX_ROUNDS, MAX_SECONDS, MAX_TOKENS
from kvquant.study.strict import Strict

Measure = Literal[
    "pack", "attention", "prefill", "steps", "layer-step", "continue", "prompt-attention"
]
ShapeName = Literal["7b-mha", "13b-mha", "8b-gqa", "70b-gqa", "tiny", "tiny-gqa"]
# They have no CPU kernel.
ON_GPU: tuple[Measure, ...] = ("attention", "steps", "continue", "prompt-attention")
WITH_PEERS: tuple[Measure, ...] = ("prefill", "layer-step")
WHOLE_MODEL: tuple[Measure, ...] = ("prefill", "steps")

# Llama-2-7B's, Llama-2-13B's, Llama-3.1-8B's and Llama-3.1-70B's dimensions, and two for tests.
SHAPES: dict[str, dict[str, int]] = {
    "7b-mha": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "13b-mha": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "8b-gqa": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b-gqa": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 4000,
    },
    "tiny-gqa": {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 4000,
    },
}


class KernelCase(Strict):
    """Settings of one case: the shape of a model with random weights and its measurements."""

    later: ClassVar[tuple[str, ...]] = ("scheme",)
    shape: ShapeName = Field(description="dimensions of the model")
    scheme: str | None = Field(
        None, description="scheme whose kernels are measured; absent: the headline"
    )
    batch: int = Field(1, ge=1, le=MAX_BATCH, description="sequences")
    tokens: int = Field(
        ge=32, le=MAX_TOKENS, multiple_of=32, description="tokens of the longest sequence"
    )
    ragged: bool = Field(False, description="lengths of whole models' prompts fall to half")
    measure: list[Measure] = Field(min_length=1, description="what is timed")
    peers: list[str] = Field(
        default_factory=list, description="schemes beside ours, in prefill and layer-step"
    )
    steps: int = Field(1000, ge=20, le=MAX_ROUNDS, description="decode steps of the whole model")
    chunk: int = Field(
        512, ge=1, le=MAX_TOKENS, description="new tokens per sequence, in 'continue'"
    )

    @model_validator(mode="after")
    def _distinct(self) -> KernelCase:
        for name in ("measure", "peers"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: an entry is given twice")
        if self.peers and not set(self.measure) & set(WITH_PEERS):
            raise ValueError(f"peers: measured in {' and '.join(WITH_PEERS)} only")
        return self


class KernelsSpec(Strict):
    """Settings of the kernel benchmark: the headline scheme against copies, fp16 and peers.

    It needs no model's weights.
    """

    cases: dict[str, KernelCase] = Field(min_length=1, description="cases by name, one job each")
    rounds: int = Field(20, ge=5, le=MAX_ROUNDS, description="timed rounds at most")
    warmup: int = Field(1, ge=1, le=MAX_ROUNDS, description="rounds before the timed ones")
    max_seconds: float = Field(
        10.0, gt=0, le=MAX_SECONDS, description="after 5 rounds no round starts later"
    )
    slow_seconds: float = Field(
        2.0, gt=0, le=MAX_SECONDS, description="a side whose warm-up takes longer is slow"
    )
    slow_rounds: int = Field(2, ge=1, le=MAX_ROUNDS, description="rounds of a slow side")
    minutes: int = Field(10, ge=1, le=MAX_MINUTES, description="expected run time of a case")
