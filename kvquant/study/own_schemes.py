"""The options of 16-bit caches and of our own scheme kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from kvquant.study.datatypes import DATATYPES
from kvquant.study.limits import MAX_TOKENS
from kvquant.study.scheme_kinds import CalibratedScheme, CodebookScheme, Scheme, scheme_kind
from kvquant.study.scheme_options import (
    BlockSize,
    CodeBits,
    CodeDatatype,
    MomentMatching,
    Sinks,
    Weighting,
)
from kvquant.study.wording import Words


@scheme_kind(
    label="16-bit cache",
    summary="transformers' growing 16-bit cache",
    nominal_bits=16,
    quantizes=False,
    splits_heads=True,
)
class Fp16Scheme(Scheme):
    """Transformers' unquantized cache, the baseline of every comparison."""

    kind: Literal["fp16"] = Field(description="kind of the scheme")


@scheme_kind(
    label="16-bit cache, allocated once",
    summary="16 bits, allocated once",
    caches="kvquant.schemes.fp16_static:make_caches",
    nominal_bits=16,
    quantizes=False,
    splits_heads=True,
)
class Fp16StaticScheme(Scheme):
    """An unquantized cache that is allocated once instead of again as it grows."""

    kind: Literal["fp16-static"] = Field(description="kind of the scheme")
    room: int = Field(
        256, ge=1, le=MAX_TOKENS, description="tokens allocated beyond those of the first call"
    )


@scheme_kind(
    label="NUQ",
    summary="ours: non-uniform codes with exact outliers; `datatype`, `keys` (below)",
    codec="kvquant.schemes.nuq:make_codec",
    splits_heads=True,
    ours=True,
)
class NuqScheme(CodebookScheme):
    """Non-uniform quantization with exact sparse outliers (ours; KVQuant's datatype)."""

    later: ClassVar[tuple[str, ...]] = (*CodebookScheme.later, "keys")
    words: ClassVar[Words] = {
        **CodebookScheme.words,
        "keys": {"after-rope": "keys after RoPE"}.__getitem__,
    }
    values: ClassVar[Words] = {
        **CodebookScheme.values,
        "keys": {"before-rope": "before RoPE", "after-rope": "after RoPE"}.__getitem__,
    }
    kind: Literal["nuq"] = Field(description="kind of the scheme")
    bits: CodeBits
    outliers: float = Field(
        0.01, ge=0.0, le=1.0, description="fraction of elements kept exactly as outliers"
    )
    sinks: Sinks = 1
    block_size: BlockSize = 64
    datatype: CodeDatatype = "nuq"
    weighting: Weighting = "fisher-range2"
    q_norm: MomentMatching = False
    keys: Literal["before-rope", "after-rope"] = Field(
        "before-rope",
        description="whether keys are quantized as they are before the rotary embedding or after "
        "it, which has no GPU kernel for attention",
    )

    @property
    def keys_after_rope(self) -> bool:
        """Returns whether keys are quantized after RoPE, and calibrated so."""
        return self.keys == "after-rope"

    def method(self) -> str:
        """Returns the name of the datatype."""
        return DATATYPES[self.datatype].label


@scheme_kind(
    label="Allocated codes",
    summary="ours: widths of codes by sensitivity, values rotated and without outliers",
    codec="kvquant.schemes.allocated:make_codec",
    tables="kvquant.formats.allocated_layer:AllocatedLayer",
    builder="kvquant.calibration.allocated_build:build_allocated",
    splits_heads=True,
    ours=True,
)
class AllocatedScheme(CalibratedScheme):
    """Codes whose widths one allocation over the whole model chooses by sensitivity (ours)."""

    words: ClassVar[Words] = {  # a default is never a part of a name
        **CalibratedScheme.words,
        "rotation": {False: "values not rotated"}.__getitem__,
        "value_range": {
            "token-head": "a range per token and head",
            "token-unscaled": "heads not scaled",
        }.__getitem__,
        "allocation": {"layer": "layers equal"}.__getitem__,
        "min_value_width": "values from {} bits".format,
    }
    terms: ClassVar[Mapping[str, str]] = {
        **CalibratedScheme.terms,
        "bits": "bits of full blocks",
        "outliers": "exact outliers of keys",
        "rotation": "values rotated",
        "value_range": "range of values",
        "allocation": "bits allocated over",
        "min_value_width": "smallest width of values",
    }
    values: ClassVar[Words] = {
        **CalibratedScheme.values,
        "value_range": {
            "token": "per token",
            "token-head": "per token and head",
            "token-unscaled": "per token, heads not scaled",
        }.__getitem__,
        "allocation": {"model": "all layers", "layer": "each layer"}.__getitem__,
    }
    kind: Literal["allocated"] = Field(description="kind of the scheme")
    bits: float = Field(
        3.3,
        ge=1.5,
        le=6.0,
        description="mean bits per element of full blocks, with outliers, pointers and scales",
    )
    outliers: float = Field(
        0.0025, ge=0.0, lt=0.5, description="fraction of key elements kept exactly as outliers"
    )
    sinks: Sinks = 1
    block_size: BlockSize = 64
    rotation: bool = Field(True, description="rotate values within their head by a Hadamard matrix")
    value_range: Literal["token", "token-head", "token-unscaled"] = Field(
        "token", description="one range per token (of scaled heads or not), or per token and head"
    )
    allocation: Literal["model", "layer"] = Field(
        "model", description="whether layers compete for bits or get equally many"
    )
    min_value_width: int | None = Field(
        None, ge=1, le=6, description="smallest width of values' codes; absent: `bits` rounded down"
    )

    def value_in_words(self, option: str) -> str:
        """Returns the value of an option in words; a width that is not given is that of `bits`."""
        if option == "min_value_width" and self.min_value_width is None:
            return f"{int(self.bits)}"
        return super().value_in_words(option)
