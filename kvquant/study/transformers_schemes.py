"""The options of transformers' own quantized caches, which are peers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kvquant.study.scheme_kinds import Scheme, scheme_kind
from kvquant.study.scheme_options import Group, RequantizedAt


@scheme_kind(
    label="Quanto",
    summary="transformers' QuantizedCache with optimum-quanto",
    caches="kvquant.schemes.hf_quantized:make_caches",
    protocols=("A",),
    extra="peers",
)
class HfQuantoScheme(Scheme):
    """Transformers' QuantizedCache with optimum-quanto."""

    kind: Literal["hf-quanto"] = Field(description="kind of the scheme")
    bits: Literal[2, 4] = Field(description="bits per code")
    group: Group = 64
    residual: RequantizedAt = 128


@scheme_kind(
    label="HQQ",
    summary="transformers' QuantizedCache with HQQ",
    caches="kvquant.schemes.hf_quantized:make_caches",
    protocols=("A",),
    batches=False,  # groups run across sequences, and levels are fitted to all sequences
    extra="peers",
)
class HfHqqScheme(Scheme):
    """Transformers' QuantizedCache with HQQ."""

    kind: Literal["hf-hqq"] = Field(description="kind of the scheme")
    bits: int = Field(json_schema_extra={"enum": [2, 4, 8]}, description="bits per code: 2, 4 or 8")
    group: Group = 64
    axis: Literal[0, 1] = Field(
        0, description="0: groups of strided elements; 1: groups of neighbouring elements"
    )
    residual: RequantizedAt = 128

    @field_validator("bits")
    @classmethod
    def _usable(cls, bits: int) -> int:
        if bits == 3:
            raise ValueError(
                "3 bits are broken in HQQ 0.2.8: with axis 1 they fail or silently return wrong "
                "data, with axis 0 they take 4 bits of storage; use 2, 4 or 8"
            )
        if bits not in (2, 4, 8):
            raise ValueError("must be 2, 4 or 8")
        return bits


@scheme_kind(
    label="FP8, one scale",
    summary="transformers' QuantizedCache in E4M3, one scale per tensor",
    caches="kvquant.schemes.hf_quantized:make_caches",
    nominal_bits=8,
    protocols=("A",),
    batches=False,  # all sequences share the scale
)
class HfFp8Scheme(Scheme):
    """Transformers' QuantizedCache in E4M3, with one scale per tensor set by the first call."""

    kind: Literal["hf-fp8"] = Field(description="kind of the scheme")
