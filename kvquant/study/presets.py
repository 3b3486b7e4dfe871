"""Registers short names of schemes, which the Python API takes in place of their options.

A study names its own schemes; these are the names that `kvquant.load(model, scheme="kivi-4")` and
`kvquant.calibrate(..., scheme="nuq3-1pct")` know. Where the default study has a scheme of the same
name, both have the same options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kvquant.errors import UserError, unknown
from kvquant.study.registrations import by_name
from kvquant.study.scheme_kinds import SCHEME_KINDS, Scheme
from kvquant.study.schemes import SchemeSpec

HEADLINE_BITS = (2, 3, 4)


@dataclass(frozen=True)
class Preset:
    """A named scheme.

    Attributes:
        name: The short name.
        scheme: The scheme with its options.
    """

    name: str
    scheme: Scheme

    @property
    def title(self) -> str:
        """The scheme's name for readers."""
        return self.scheme.title(self.name)


def _preset(name: str, kind: str, **options: Any) -> Preset:
    return Preset(name, TypeAdapter(SchemeSpec).validate_python({"kind": kind, **options}))


# A new preset is one line. The first one of a kind stands for it on the command line.
PRESETS: dict[str, Preset] = by_name(
    [
        _preset("fp16", "fp16"),
        _preset("fp16-static", "fp16-static"),
        # true mean bits of full blocks: 4, 3 and 2 bits with what `nuq` needs beside its codes
        _preset("allocated-3", "allocated", bits=3.4),
        _preset("allocated-4", "allocated", bits=4.4),
        _preset("allocated-2", "allocated", bits=2.4),
        _preset("nuq3-1pct", "nuq", bits=3, outliers=0.01),
        _preset("nuq4-1pct", "nuq", bits=4, outliers=0.01),
        _preset("nuq2-1pct", "nuq", bits=2, outliers=0.01),
        _preset("kivi-4", "kivi", bits=4),
        _preset("kivi-2", "kivi", bits=2),
        _preset("int4-hadamard", "int4-hadamard"),
        _preset("fp8", "fp8"),
        _preset("turboquant-3", "turboquant", bits=3),
        _preset("turboquant-4", "turboquant", bits=4),
        _preset("turboquant-2", "turboquant", bits=2),
        _preset("kvarn-4", "kvarn", bits=4),
        _preset("kvarn-3", "kvarn", bits=3),
        _preset("kvarn-2", "kvarn", bits=2),
        _preset("block-gtq-3", "block-gtq", bits=3),
        _preset("block-gtq-4", "block-gtq", bits=4),
        _preset("block-gtq-2", "block-gtq", bits=2),
        _preset("wush-4", "wush-kv", bits=4),
        _preset("wush-3", "wush-kv", bits=3),
        _preset("wush-2", "wush-kv", bits=2),
        _preset("cq-4c8b", "cq", bits=2, channels=4),
        _preset("cq-2c8b", "cq", bits=4, channels=2),
        _preset("kvquant-ref3-1pct", "kvquant-ref", bits=3, outliers=0.01),
        _preset("hf-quanto-4", "hf-quanto", bits=4),
        _preset("hf-quanto-2", "hf-quanto", bits=2),
        _preset("hf-hqq-4", "hf-hqq", bits=4),
        _preset("hf-fp8", "hf-fp8"),
    ]
)


def scheme_presets() -> dict[str, Scheme]:
    """Returns the schemes that have short names, by these names.

    `kvquant.load` and `kvquant.calibrate` take the names as `scheme=`. Those whose
    `registration.calibrated` is true need a quantizer from `kvquant.calibrate`; the others work at
    once.
    """
    return {name: preset.scheme for name, preset in PRESETS.items()}


def scheme_from(given: Scheme | str | Mapping[str, Any]) -> Scheme:
    """Returns the scheme that a name, options as in a study, or a scheme denote.

    Args:
        given: A short name ("kivi-4"), a mapping as in a study (`{"kind": "kivi", "bits": 4}`), or
            a scheme.

    Raises:
        UserError: The name, the kind or an option is unknown.
    """
    if isinstance(given, Scheme):
        return given
    if isinstance(given, str):
        if given not in PRESETS:
            raise unknown("scheme", given, PRESETS)
        return PRESETS[given].scheme
    if not isinstance(given, Mapping):
        raise UserError(
            f"scheme: must be a name, a mapping with a kind or a scheme, got {type(given).__name__}"
        )
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in SCHEME_KINDS:
        raise unknown("scheme kind", str(kind), SCHEME_KINDS)
    try:
        return SCHEME_KINDS[kind].options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or str(first.get("ctx", {}).get("field", ""))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown option of kind '{kind}'"
        raise UserError(f"scheme{'.' if where else ''}{where}: {message}") from None


def headline_scheme(bits: int) -> Scheme:
    """Returns the headline scheme, which is of allocated codes, with 4, 3 or 2 bits.

    Args:
        bits: 4, 3 or 2; full blocks really take 4.4, 3.4 or 2.4 bits per element.

    Raises:
        UserError: It is none of these.
    """
    if bits not in HEADLINE_BITS or isinstance(bits, bool):
        raise UserError(
            f"bits: {bits!r} is none of 4, 3 and 2; a scheme with other options is given as scheme="
        )
    return PRESETS[f"allocated-{bits:.0f}"].scheme
