"""Options that several scheme kinds have, each with its limits and its meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvquant.study.datatypes import DatatypeName
from kvquant.study.limits import MAX_TOKENS
from kvquant.study.scheme_kinds import Scheme

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


class TokenScheme(Scheme):
    """The options of schemes that quantize each token separately."""

    sinks: Sinks = 0
    block_size: Literal[16, 32, 64, 128, 256] = Field(64, description="tokens per block")
    residual: Residual = 0
