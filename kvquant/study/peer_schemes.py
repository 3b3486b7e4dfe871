"""The options of peers that need no calibration, written for our cache."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvquant.study.limits import MAX_SEED
from kvquant.study.scheme_kinds import Scheme, scheme_kind
from kvquant.study.scheme_options import CodeBits, Group, Residual, Sinks, TokenScheme


@scheme_kind(
    label="KIVI",
    summary="KIVI: groups, a 16-bit residual; `sinks`",
    codec="kvquant.schemes.kivi:make_codec",
    splits_heads=True,
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


@scheme_kind(
    label="FP8",
    summary="E4M3, one scale per token and head, or none",
    codec="kvquant.schemes.fp8:make_codec",
    splits_heads=True,
    nominal_bits=8,
    reference="arXiv 2209.05433",
)
class Fp8Scheme(TokenScheme):
    """8-bit floating point (E4M3), with one scale per token and head or without scales."""

    kind: Literal["fp8"] = Field(description="kind of the scheme")
    scale: Literal["token-head", "none"] = Field(
        "token-head", description="one scale per token and head, or none"
    )


@scheme_kind(
    label="TurboQuant",
    summary="TurboQuant: rotation, norm, Lloyd-Max levels",
    codec="kvquant.schemes.turboquant:make_codec",
    splits_heads=True,
    reference="arXiv 2504.19874",
)
class TurboQuantScheme(TokenScheme):
    """TurboQuant (arXiv 2504.19874): random rotation, 16-bit norm, Lloyd-Max levels."""

    kind: Literal["turboquant"] = Field(description="kind of the scheme")
    bits: CodeBits
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of the random signs")


@scheme_kind(
    label="INT4-Hadamard",
    summary="SAW-INT4: INT4 per token and head after a rotation",
    codec="kvquant.schemes.int4_hadamard:make_codec",
    splits_heads=True,
    nominal_bits=4,
    reference="arXiv 2604.19157",
)
class Int4HadamardScheme(TokenScheme):
    """Asymmetric INT4 per token and head after a Hadamard rotation (SAW-INT4, arXiv 2604.19157)."""

    kind: Literal["int4-hadamard"] = Field(description="kind of the scheme")


@scheme_kind(
    label="KVarN",
    summary="KVarN: tiles of balanced variance after a rotation, 16-bit `sinks`",
    codec="kvquant.schemes.kvarn:make_codec",
    splits_heads=True,
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


# A new peer without calibration goes above this line; CONTRIBUTING.md has the other steps.
