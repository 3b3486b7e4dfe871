"""The study's optional section `append:`, without torch; part of :mod:`kvquant.study.config`."""

from __future__ import annotations

from pydantic import Field, model_validator

from kvquant.study.limits import (
    MAX_BATCH,
    MAX_MINUTES,
    MAX_NAMES,
    MAX_REPS,
    MAX_ROUNDS,
    MAX_TOKENS,
)
from kvquant.study.strict import Strict


class AppendSpec(Strict):
    """Settings of the append benchmark: the cost of a token in a cache that holds many.

    It measures one layer with random 16-bit data and needs no model.
    """

    sizes: list[int] = Field(
        [1024 * 2**i for i in range(8)],
        min_length=2,
        max_length=MAX_NAMES,
        description="tokens a sequence holds before the timed calls",
    )
    chunks: list[int] = Field(
        [1, 64], min_length=1, max_length=MAX_NAMES, description="tokens per sequence and call"
    )
    schemes: list[str] = Field(
        default_factory=list, description="empty: the baseline and the headline scheme"
    )
    concatenation: bool = Field(
        True, description="also the headline scheme with arrays grown by concatenation, as KVQuant"
    )
    batch_size: int = Field(1, ge=1, le=MAX_BATCH, description="sequences per batch")
    kv_heads: int = Field(8, ge=1, le=MAX_BATCH, description="key-value heads of the layer")
    head_dim: int = Field(128, ge=8, le=MAX_BATCH, multiple_of=8, description="channels per head")
    rounds: int = Field(
        10, ge=5, le=MAX_ROUNDS, description="timed rounds per size; a round fills whole blocks"
    )
    reps: int = Field(1, ge=1, le=MAX_REPS, description="independent jobs")
    minutes: int = Field(30, ge=1, le=MAX_MINUTES, description="expected run time of one job")

    @model_validator(mode="after")
    def _increasing(self) -> AppendSpec:
        for name in ("sizes", "chunks"):
            values = getattr(self, name)
            if max(values) > MAX_TOKENS:
                raise ValueError(f"{name}: at most {MAX_TOKENS:,} tokens")
            if min(values) < 1 or values != sorted(set(values)):
                raise ValueError(f"{name}: must be positive and increasing")
        return self
