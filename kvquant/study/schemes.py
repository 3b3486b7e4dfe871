"""Kinds of schemes and their options, as a study names them; without importing torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kvquant.errors import unknown
from kvquant.study.numbers import MAX_TOKENS, refuse_lossy

MAX_SEED = 2**31 - 1
# Names in the registry of kvquant.quantization.nuq, which this module cannot import; a test holds
# them together.
DATATYPES = ("nuq", "nf", "uniform")


class Strict(BaseModel):
    """Base of everything in a study file: no unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, raw: Any) -> Any:
        for name, value in raw.items() if isinstance(raw, dict) else ():
            if name in cls.model_fields:
                try:
                    refuse_lossy(value, cls.model_fields[name].annotation)
                except ValueError as error:
                    context = {"field": name, "reason": str(error)}
                    raise PydanticCustomError("lossy", "{reason}", context) from None
        return raw

    # Options that came after results were published: at their default they are not written, so
    # that the digest of what was measured before them stays.
    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = plain(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                written.pop(name, None)
        return written


def _known_datatype(name: str) -> str:
    if name not in DATATYPES:
        raise ValueError(str(unknown("datatype", name, DATATYPES)))
    return name


Datatype = Annotated[str, AfterValidator(_known_datatype)]


class _Scheme(Strict):
    # Protocols that the scheme's cache can be measured under, and whether it quantizes at all.
    protocols: ClassVar[tuple[str, ...]] = ("A", "B")
    quantizes: ClassVar[bool] = True
    # Whether what a sequence reads back is the same in every batch.
    batches: ClassVar[bool] = True


class Fp16Scheme(_Scheme):
    """The unquantized cache, the baseline of every comparison."""

    quantizes: ClassVar[bool] = False
    kind: Literal["fp16"] = Field(description="kind of the scheme")


class Fp16StaticScheme(_Scheme):
    """An unquantized cache allocated once, in place of one that is reallocated as it grows."""

    quantizes: ClassVar[bool] = False
    kind: Literal["fp16-static"] = Field(description="kind of the scheme")
    room: int = Field(
        256, ge=1, le=MAX_TOKENS, description="tokens allocated beyond the first call's"
    )


class NuqScheme(_Scheme):
    """Non-uniform quantization with exact sparse outliers (ours; KVQuant's datatype)."""

    kind: Literal["nuq"] = Field(description="kind of the scheme")
    bits: Literal[2, 3, 4] = Field(description="bits per code")
    outliers: float = Field(0.01, ge=0.0, le=1.0, description="fraction of exact outliers")
    sinks: int = Field(
        1, ge=0, le=MAX_TOKENS, description="first tokens of each sequence kept in fp16"
    )
    block_size: Literal[32, 64, 128, 256, 512, 1024] = Field(
        64, description="tokens per block of memory"
    )
    datatype: Datatype = Field("nuq", description="datatype of the codes")
    weighting: Literal["fisher-range2", "fisher", "none"] = Field(
        "fisher-range2", description="weights of the k-means that fits codebooks"
    )
    q_norm: bool = Field(False, description="match mean and variance of the quantized data")


class KiviScheme(_Scheme):
    """KIVI (arXiv 2402.02750): keys per channel, values per token, in groups, with a residual."""

    later: ClassVar[tuple[str, ...]] = ("sinks",)
    kind: Literal["kivi"] = Field(description="kind of the scheme")
    bits: Literal[2, 3, 4] = Field(description="bits per code")
    group: int = Field(
        32, ge=8, le=MAX_TOKENS, description="elements that share a scale and a zero"
    )
    residual: int = Field(128, ge=0, le=MAX_TOKENS, description="most recent tokens kept in fp16")
    sinks: int = Field(
        0, ge=0, le=MAX_TOKENS, description="first tokens of each sequence kept in 16 bits"
    )


class _TokenScheme(_Scheme):
    """Options of schemes that quantize each token by itself."""

    sinks: int = Field(
        0, ge=0, le=MAX_TOKENS, description="first tokens of each sequence kept in 16 bits"
    )
    block_size: Literal[16, 32, 64, 128, 256] = Field(64, description="tokens packed at a time")
    residual: int = Field(0, ge=0, le=MAX_TOKENS, description="most recent tokens kept in 16 bits")


class Fp8Scheme(_TokenScheme):
    """8-bit floating point (E4M3)."""

    kind: Literal["fp8"] = Field(description="kind of the scheme")
    scale: Literal["token-head", "none"] = Field(
        "token-head", description="one scale per token and head, or none"
    )


class TurboQuantScheme(_TokenScheme):
    """TurboQuant (arXiv 2504.19874): random rotation, 16-bit norm, Lloyd-Max levels."""

    kind: Literal["turboquant"] = Field(description="kind of the scheme")
    bits: Literal[2, 3, 4] = Field(description="bits per code")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the random signs")


class Int4HadamardScheme(_TokenScheme):
    """Asymmetric INT4 per token and head after a Hadamard rotation (SAW-INT4, arXiv 2604.19157)."""

    kind: Literal["int4-hadamard"] = Field(description="kind of the scheme")


class KvquantRefScheme(_Scheme):
    """KVQuant's published procedure (arXiv 2401.18079): one sequence at a time, growing arrays."""

    kind: Literal["kvquant-ref"] = Field(description="kind of the scheme")
    bits: Literal[2, 3, 4] = Field(description="bits per code")
    outliers: float = Field(0.01, ge=0.0, lt=0.5, description="fraction of exact outliers")
    sinks: int = Field(
        1, ge=0, le=MAX_TOKENS, description="first tokens of each sequence kept in fp16"
    )
    room: int = Field(
        256, ge=1, le=MAX_TOKENS, description="tokens of dense codes allocated beyond the prompt's"
    )
    datatype: Datatype = Field("nuq", description="datatype of the codes")
    weighting: Literal["fisher-range2", "fisher", "none"] = Field(
        "fisher-range2", description="weights of the k-means that fits codebooks"
    )
    q_norm: bool = Field(False, description="match mean and variance of the quantized data")


class HfQuantoScheme(_Scheme):
    """Transformers' QuantizedCache with optimum-quanto."""

    protocols: ClassVar[tuple[str, ...]] = ("A",)
    kind: Literal["hf-quanto"] = Field(description="kind of the scheme")
    bits: Literal[2, 4] = Field(description="bits per code")
    group: int = Field(
        64, ge=8, le=MAX_TOKENS, description="elements that share a scale and a zero"
    )
    residual: int = Field(
        128, ge=1, le=MAX_TOKENS, description="16-bit tokens at which all is quantized again"
    )


class HfHqqScheme(_Scheme):
    """Transformers' QuantizedCache with HQQ."""

    protocols: ClassVar[tuple[str, ...]] = ("A",)
    batches: ClassVar[bool] = False  # groups run across sequences, levels are fitted to all
    kind: Literal["hf-hqq"] = Field(description="kind of the scheme")
    bits: int = Field(json_schema_extra={"enum": [2, 4, 8]}, description="bits per code: 2, 4 or 8")
    group: int = Field(
        64, ge=8, le=MAX_TOKENS, description="elements that share a scale and a zero"
    )
    axis: Literal[0, 1] = Field(0, description="0: groups of strided elements; 1: of neighbours")
    residual: int = Field(
        128, ge=1, le=MAX_TOKENS, description="16-bit tokens at which all is quantized again"
    )

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


class HfFp8Scheme(_Scheme):
    """Transformers' QuantizedCache in E4M3, one scale a tensor, set by the first call."""

    protocols: ClassVar[tuple[str, ...]] = ("A",)
    batches: ClassVar[bool] = False  # the scale is of all sequences
    kind: Literal["hf-fp8"] = Field(description="kind of the scheme")


CalibratedScheme = NuqScheme | KvquantRefScheme
AnyScheme = (
    Fp16Scheme
    | Fp16StaticScheme
    | NuqScheme
    | KiviScheme
    | Fp8Scheme
    | TurboQuantScheme
    | Int4HadamardScheme
    | KvquantRefScheme
    | HfQuantoScheme
    | HfHqqScheme
    | HfFp8Scheme
)
SchemeSpec = Annotated[AnyScheme, Field(discriminator="kind")]
KINDS = tuple(t.model_fields["kind"].annotation.__args__[0] for t in AnyScheme.__args__)
