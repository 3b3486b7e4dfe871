"""The scheme kinds and their options as a study names them, without importing torch.

To add a kind, register the class of its options here and write its implementation in
`kvquant/schemes/`. Everything else finds the kind through its registration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Union

from pydantic import Field, field_validator, model_validator

from kvquant.study.datatypes import DATATYPES, DatatypeName
from kvquant.study.limits import MAX_SEED, MAX_TOKENS
from kvquant.study.scheme_kinds import (
    SCHEME_KINDS,
    CalibratedScheme,
    CodebookScheme,
    Scheme,
    scheme_kind,
)
from kvquant.study.wording import Words

# Options that several kinds have, each with its limits and its meaning.
CodeBits = Annotated[Literal[2, 3, 4], Field(description="bits per code")]
Sinks = Annotated[
    int,
    Field(ge=0, le=MAX_TOKENS, description="first tokens of each sequence kept in 16 bits"),
]
Residual = Annotated[
    int, Field(ge=0, le=MAX_TOKENS, description="most recent tokens kept in 16 bits")
]
RequantizedAt = Annotated[
    int,
    Field(
        ge=1,
        le=MAX_TOKENS,
        description="number of 16-bit tokens at which the whole cache is quantized again",
    ),
]
Group = Annotated[
    int,
    Field(ge=8, le=MAX_TOKENS, description="elements per group, which share a scale and an offset"),
]
BlockSize = Annotated[Literal[32, 64, 128, 256, 512, 1024], Field(description="tokens per block")]
CodeDatatype = Annotated[DatatypeName, Field(description="datatype of the codes")]
Weighting = Annotated[
    Literal["fisher-range2", "fisher", "none"],
    Field(description="weights of the k-means that fits codebooks"),
]
MomentMatching = Annotated[
    bool, Field(description="adjust levels so that quantized data keeps its mean and variance")
]


@scheme_kind(
    label="16-bit cache",
    summary="transformers' growing 16-bit cache",
    nominal_bits=16,
    quantizes=False,
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
)
class Fp16StaticScheme(Scheme):
    """An unquantized cache that is allocated once instead of again as it grows."""

    kind: Literal["fp16-static"] = Field(description="kind of the scheme")
    room: int = Field(
        256, ge=1, le=MAX_TOKENS, description="tokens allocated beyond those of the first call"
    )


@scheme_kind(
    label="NUQ",
    summary="ours: non-uniform codes with exact outliers; `datatype` (below)",
    codec="kvquant.schemes.nuq:make_codec",
)
class NuqScheme(CodebookScheme):
    """Non-uniform quantization with exact sparse outliers (ours; KVQuant's datatype)."""

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

    def method(self) -> str:
        """Returns the name of the datatype."""
        return DATATYPES[self.datatype].label


@scheme_kind(
    label="Allocated codes",
    summary="ours: widths of codes by sensitivity, values rotated and without outliers",
    codec="kvquant.schemes.allocated:make_codec",
    tables="kvquant.formats.allocated_layer:AllocatedLayer",
    builder="kvquant.calibration.allocated_build:build_allocated",
)
class AllocatedScheme(CalibratedScheme):
    """Codes whose widths one allocation over the whole model chooses by sensitivity (ours)."""

    words: ClassVar[Words] = {  # a default is never a part of a name
        **Scheme.words,
        "rotation": {False: "values not rotated"}.__getitem__,
        "value_range": {
            "token-head": "a range per token and head",
            "token-unscaled": "heads not scaled",
        }.__getitem__,
        "allocation": {"layer": "layers equal"}.__getitem__,
        "min_value_width": "values from {} bits".format,
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


@scheme_kind(
    label="KIVI",
    summary="KIVI: groups, a 16-bit residual; `sinks`",
    codec="kvquant.schemes.kivi:make_codec",
    reference="arXiv 2402.02750",
)
class KiviScheme(Scheme):
    """KIVI (arXiv 2402.02750): keys per channel, values per token, in groups, with a residual."""

    later: ClassVar[tuple[str, ...]] = (*Scheme.later, "sinks")
    kind: Literal["kivi"] = Field(description="kind of the scheme")
    bits: CodeBits
    group: Group = 32
    residual: Residual = 128
    sinks: Sinks = 0


class _TokenScheme(Scheme):
    """The options of schemes that quantize each token separately."""

    sinks: Sinks = 0
    block_size: Literal[16, 32, 64, 128, 256] = Field(64, description="tokens per block")
    residual: Residual = 0


@scheme_kind(
    label="FP8",
    summary="E4M3, one scale per token and head, or none",
    codec="kvquant.schemes.fp8:make_codec",
    nominal_bits=8,
    reference="arXiv 2209.05433",
)
class Fp8Scheme(_TokenScheme):
    """8-bit floating point (E4M3), with one scale per token and head or without scales."""

    kind: Literal["fp8"] = Field(description="kind of the scheme")
    scale: Literal["token-head", "none"] = Field(
        "token-head", description="one scale per token and head, or none"
    )


@scheme_kind(
    label="TurboQuant",
    summary="TurboQuant: rotation, norm, Lloyd-Max levels",
    codec="kvquant.schemes.turboquant:make_codec",
    reference="arXiv 2504.19874",
)
class TurboQuantScheme(_TokenScheme):
    """TurboQuant (arXiv 2504.19874): random rotation, 16-bit norm, Lloyd-Max levels."""

    kind: Literal["turboquant"] = Field(description="kind of the scheme")
    bits: CodeBits
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the random signs")


@scheme_kind(
    label="INT4-Hadamard",
    summary="SAW-INT4: INT4 per token and head after a rotation",
    codec="kvquant.schemes.int4_hadamard:make_codec",
    nominal_bits=4,
    reference="arXiv 2604.19157",
)
class Int4HadamardScheme(_TokenScheme):
    """Asymmetric INT4 per token and head after a Hadamard rotation (SAW-INT4, arXiv 2604.19157)."""

    kind: Literal["int4-hadamard"] = Field(description="kind of the scheme")


@scheme_kind(
    label="KVarN",
    summary="KVarN: tiles of balanced variance after a rotation, 16-bit `sinks`",
    codec="kvquant.schemes.kvarn:make_codec",
    reference="arXiv 2606.03458",
)
class KvarnScheme(Scheme):
    """KVarN (arXiv 2606.03458): rotation, variances balanced in tiles, keys coded per channel."""

    kind: Literal["kvarn"] = Field(description="kind of the scheme")
    bits: CodeBits
    value_bits: CodeBits | None = Field(
        None, description="bits per code of values, if other than `bits` (published: 2 beside 4)"
    )
    tile: Literal[16, 32, 64, 128, 256] = Field(
        128, description="tokens per tile, whose variances are balanced"
    )
    iterations: int = Field(
        16, ge=0, le=64, description="passes that balance variances; 0: none, rotation alone"
    )
    sinks: Sinks = 128
    residual: Residual = 0


@scheme_kind(
    label="Block-GTQ",
    summary="Block-GTQ: widths of keys per RoPE pair by energy, rotation, norm, Lloyd-Max levels",
    codec="kvquant.schemes.block_gtq:make_codec",
    tables="kvquant.formats.block_gtq_layer:BlockGtqLayer",
    builder="kvquant.calibration.block_gtq_build:build_block_gtq",
    reference="arXiv 2606.24033",
)
class BlockGtqScheme(_TokenScheme, CalibratedScheme):
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
    label="KVQuant's procedure",
    summary="KVQuant's published procedure, the baseline of speed claims",
    caches="kvquant.schemes.kvquant_ref:make_caches",
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


# A new kind goes above this line: a study may list schemes of every kind registered above.
if TYPE_CHECKING:
    SchemeSpec = Scheme
else:
    SchemeSpec = Annotated[
        Union[tuple(kind.options for kind in SCHEME_KINDS.values())],  # noqa: UP007
        Field(discriminator="kind"),
    ]
