"""The study's optional section `append:`, without torch; part of :mod:`kvquant.config`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AppendSpec(BaseModel):
    """What a token costs when it is appended to a cache that already holds many.

    One layer, random 16-bit data; needs no model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sizes: list[int] = Field(
        [1024 * 2**i for i in range(8)],
        min_length=2,
        description="tokens a sequence holds before the timed calls",
    )
    chunks: list[int] = Field([1, 64], min_length=1, description="tokens a sequence and call")
    schemes: list[str] = Field(
        default_factory=list, description="empty: the baseline and the headline scheme"
    )
    concatenation: bool = Field(
        True, description="also the headline scheme with arrays grown by concatenation, as KVQuant"
    )
    batch_size: int = Field(1, ge=1)
    kv_heads: int = Field(8, ge=1)
    head_dim: int = Field(128, ge=8, multiple_of=8)
    rounds: int = Field(10, ge=5, description="timed rounds a size; a round fills whole blocks")
    reps: int = Field(1, ge=1, description="independent jobs")
    minutes: int = Field(30, ge=1, description="expected run time of one job")

    @model_validator(mode="after")
    def _increasing(self) -> AppendSpec:
        for name in ("sizes", "chunks"):
            values = getattr(self, name)
            if min(values) < 1 or values != sorted(set(values)):
                raise ValueError(f"{name}: must be positive and increasing")
        return self
