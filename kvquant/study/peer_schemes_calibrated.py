"""The options of peers that are built from calibration statistics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kvquant.study.limits import MAX_SEED, MAX_TOKENS
from kvquant.study.scheme_kinds import CalibratedScheme, CodebookScheme, scheme_kind
from kvquant.study.scheme_options import (
    CodeBits,
    CodeDatatype,
    MomentMatching,
    Residual,
    Sinks,
    TokenScheme,
    Weighting,
)


@scheme_kind(
    label="Block-GTQ",
    summary="Block-GTQ: widths of keys per RoPE pair by energy, rotation, norm, Lloyd-Max levels",
    codec="kvquant.schemes.block_gtq:make_codec",
    splits_heads=True,
    tables="kvquant.formats.block_gtq_layer:BlockGtqLayer",
    builder="kvquant.calibration.block_gtq_build:build_block_gtq",
    reference="arXiv 2606.24033",
)
class BlockGtqScheme(TokenScheme, CalibratedScheme):
    """Block-GTQ (arXiv 2606.24033): widths of keys per RoPE pair by query and key energies."""

    kind: Literal["block-gtq"] = Field(description="kind of the scheme")
    bits: float = Field(3.0, ge=1.0, le=8.0, description="mean bits per code of keys")
    value_bits: CodeBits | None = Field(
        None, description="bits per code of values, if other than `bits` (published: 2 and 3)"
    )
    min_width: int = Field(1, ge=1, le=8, description="smallest width of a pair's codes")
    max_width: int = Field(8, ge=1, le=8, description="largest width of a pair's codes")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the random rotations")

    @model_validator(mode="after")
    def _possible(self) -> BlockGtqScheme:
        if not self.min_width <= self.bits <= self.max_width:
            raise ValueError(
                f"bits: {self.bits:g} is not between min_width {self.min_width} and max_width "
                f"{self.max_width}"
            )
        if self.value_bits is None and self.bits not in (2, 3, 4):
            raise ValueError(f"value_bits: must be given (2, 3 or 4) where bits is {self.bits:g}")
        return self

    @property
    def width_of_values(self) -> int:
        """Returns the bits per code of values."""
        return int(self.bits) if self.value_bits is None else self.value_bits


@scheme_kind(
    label="WUSH-KV",
    summary="WUSH-KV: transforms per head by queries and W_O, clipped uniform levels; windows",
    codec="kvquant.schemes.wush_kv:make_codec",
    splits_heads=True,
    tables="kvquant.formats.wush_layer:WushLayer",
    builder="kvquant.calibration.wush_build:build_wush",
    reference="arXiv 2609.38121",
)
class WushKvScheme(CalibratedScheme):
    """WUSH-KV (arXiv 2609.38121): closed-form transforms per head, QuEST's clipped quantizer."""

    kind: Literal["wush-kv"] = Field(description="kind of the scheme")
    bits: CodeBits
    value_bits: CodeBits | None = Field(
        None, description="bits per code of values, if other than `bits`"
    )
    damping: float = Field(
        0.01, gt=0.0, le=1.0, description="share of their mean diagonals added to second moments"
    )
    sinks: Sinks = 16
    block_size: Literal[16, 32, 64, 128, 256] = Field(16, description="tokens per block")
    residual: Residual = 128


@scheme_kind(
    label="CQ",
    summary="CQ: channels of a head coded together, centroids by Fisher-weighted k-means",
    codec="kvquant.schemes.cq:make_codec",
    splits_heads=True,
    tables="kvquant.formats.cq_layer:CqLayer",
    builder="kvquant.calibration.cq_build:build_cq",
    reference="arXiv 2405.03917",
)
class CqScheme(TokenScheme, CalibratedScheme):
    """CQ (arXiv 2405.03917): neighbouring channels of a head share one code of a codebook."""

    kind: Literal["cq"] = Field(description="kind of the scheme")
    bits: float = Field(
        2.0, ge=0.125, le=8.0, description="bits per channel, without codebooks; see `channels`"
    )
    channels: Literal[1, 2, 4, 8, 16] = Field(
        4, description="channels per code, which has `channels` times `bits` bits: 1 to 8"
    )
    samples: int = Field(
        4096,
        ge=256,
        le=MAX_TOKENS,
        description="calibration tokens per layer, at most, that centroids are fitted to",
    )

    @model_validator(mode="after")
    def _whole_code(self) -> CqScheme:
        width = self.bits * self.channels
        if width not in range(1, 9):
            raise ValueError(
                f"bits: {self.bits:g} times channels {self.channels} is {width:g} bits per code, "
                "which must be a whole number from 1 to 8"
            )
        return self

    @property
    def table_bits(self) -> float:
        """Returns the bits per code."""
        return self.bits * self.channels

    @property
    def sampled_tokens(self) -> int:
        """Returns how many whole tokens per layer calibration must keep, at most."""
        return self.samples

    @property
    def nominal_bits(self) -> int:
        """Returns the bits per channel, rounded down."""
        return int(self.bits)


@scheme_kind(
    label="KVQuant's procedure",
    summary="KVQuant's published procedure, the baseline of speed claims",
    caches="kvquant.schemes.kvquant_ref:make_caches",
    prompt_attention=False,  # it reads stored tokens by an attention of its own
    reference="arXiv 2401.18079",
)
class KvquantRefScheme(CodebookScheme):
    """KVQuant's published procedure (arXiv 2401.18079): one sequence at a time, growing arrays."""

    kind: Literal["kvquant-ref"] = Field(description="kind of the scheme")
    bits: CodeBits
    outliers: float = Field(
        0.01, ge=0.0, lt=0.5, description="fraction of elements kept exactly as outliers"
    )
    sinks: Sinks = 1
    room: int = Field(
        256,
        ge=1,
        le=MAX_TOKENS,
        description="tokens of dense codes allocated beyond those of the prompt",
    )
    datatype: CodeDatatype = "nuq"
    weighting: Weighting = "fisher-range2"
    q_norm: MomentMatching = False
