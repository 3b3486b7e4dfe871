"""All scheme kinds as a study names them, without importing torch.

A kind is the class of its options, registered in one of the modules below, and its implementation
in `kvquant/schemes/`. Everything else finds the kind through its registration. Kinds are listed in
the order of these imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from kvquant.study.own_schemes import AllocatedScheme, Fp16Scheme, Fp16StaticScheme, NuqScheme
from kvquant.study.peer_schemes import (
    Fp8Scheme,
    Int4HadamardScheme,
    KiviScheme,
    KvarnScheme,
    TurboQuantScheme,
)
from kvquant.study.peer_schemes_calibrated import (
    BlockGtqScheme,
    CqScheme,
    KvquantRefScheme,
    WushKvScheme,
)
from kvquant.study.scheme_kinds import SCHEME_KINDS, Scheme
from kvquant.study.transformers_schemes import HfFp8Scheme, HfHqqScheme, HfQuantoScheme

__all__ = [
    "SCHEME_KINDS",
    "AllocatedScheme",
    "BlockGtqScheme",
    "CqScheme",
    "Fp8Scheme",
    "Fp16Scheme",
    "Fp16StaticScheme",
    "HfFp8Scheme",
    "HfHqqScheme",
    "HfQuantoScheme",
    "Int4HadamardScheme",
    "KiviScheme",
    "KvarnScheme",
    "KvquantRefScheme",
    "NuqScheme",
    "SchemeSpec",
    "TurboQuantScheme",
    "WushKvScheme",
]

if TYPE_CHECKING:
    SchemeSpec = Scheme
else:  # a study may list schemes of every registered kind
    SchemeSpec = Annotated[
        Union[tuple(kind.options for kind in SCHEME_KINDS.values())],  # noqa: UP007
        Field(discriminator="kind"),
    ]
