"""Reads schemes from a command line: a name, a kind, or a kind with options."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from kvquant.errors import UserError, unknown
from kvquant.study.scheme_kinds import SCHEME_KINDS, Scheme
from kvquant.study.schemes import SchemeSpec

# The options of named schemes, which are those of the default study. The first scheme of a kind is
# the one that the kind's name stands for.
NAMED: dict[str, dict[str, Any]] = {
    "fp16": {"kind": "fp16"},
    "fp16-static": {"kind": "fp16-static"},
    "allocated-3": {"kind": "allocated", "bits": 3.4},
    "allocated-4": {"kind": "allocated", "bits": 4.4},
    "allocated-2": {"kind": "allocated", "bits": 2.4},
    "nuq3-1pct": {"kind": "nuq", "bits": 3, "outliers": 0.01},
    "nuq4-1pct": {"kind": "nuq", "bits": 4, "outliers": 0.01},
    "nuq2-1pct": {"kind": "nuq", "bits": 2, "outliers": 0.01},
    "kivi-4": {"kind": "kivi", "bits": 4},
    "kivi-2": {"kind": "kivi", "bits": 2},
    "fp8": {"kind": "fp8"},
    "int4-hadamard": {"kind": "int4-hadamard"},
    "turboquant-3": {"kind": "turboquant", "bits": 3},
    "kvarn-4": {"kind": "kvarn", "bits": 4},
    "block-gtq-3": {"kind": "block-gtq", "bits": 3},
    "wush-4": {"kind": "wush-kv", "bits": 4},
    "cq-4c8b": {"kind": "cq", "bits": 2, "channels": 4},
    "kvquant-ref3-1pct": {"kind": "kvquant-ref", "bits": 3, "outliers": 0.01},
    "hf-quanto-4": {"kind": "hf-quanto", "bits": 4},
    "hf-hqq-4": {"kind": "hf-hqq", "bits": 4},
    "hf-fp8": {"kind": "hf-fp8"},
}


def _validated(text: str, options: dict[str, Any]) -> Scheme:
    try:
        return TypeAdapter[Scheme](SchemeSpec).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        told = first["msg"].removeprefix("Value error, ")
        raise UserError(f"--scheme: {text}: {where + ': ' if where else ''}{told}") from None


def asked_scheme(text: str) -> Scheme:
    """Returns the scheme that a word of a command line names.

    Args:
        text: A name of :data:`NAMED`, a kind, or its options such as "kind=nuq,bits=3".

    Raises:
        UserError: There is no such name, kind or option.
    """
    if "=" not in text:
        of_kinds = {o["kind"]: o for o in reversed(NAMED.values())}
        known = of_kinds | NAMED
        if text not in known:
            raise unknown("scheme", text, known)
        return _validated(text, known[text])
    options: dict[str, Any] = {}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        if not equals or not name or name in options:
            raise UserError(f"--scheme: {text}: write it as kind=nuq,bits=3, each option once")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--scheme: {text}: {name}: '{value}' is no value") from None
    if options.get("kind") not in SCHEME_KINDS:
        raise unknown("scheme kind", str(options.get("kind")), SCHEME_KINDS)
    return _validated(text, options)


def asked_schemes(texts: list[str]) -> dict[str, Scheme]:
    """Returns schemes by the words that name them."""
    return {text: asked_scheme(text) for text in texts}


def one_of_each_kind() -> dict[str, Scheme]:
    """Returns one scheme of every registered kind by its name."""
    found: dict[str, Scheme] = {}
    for kind in SCHEME_KINDS:
        name = next((n for n, options in NAMED.items() if options["kind"] == kind), kind)
        if name in NAMED:
            found[name] = asked_scheme(name)
    return found
