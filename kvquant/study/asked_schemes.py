"""Reads schemes from a command line: a name, a kind, or a kind with options."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from kvquant.errors import UserError, unknown
from kvquant.study.presets import PRESETS
from kvquant.study.scheme_kinds import SCHEME_KINDS, Scheme
from kvquant.study.schemes import SchemeSpec


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
        text: A short name (:mod:`kvquant.study.presets`), a kind, which its first name stands for,
            or its options such as "kind=nuq,bits=3".

    Raises:
        UserError: There is no such name, kind or option.
    """
    if "=" not in text:
        of_kinds = {preset.scheme.kind: preset for preset in reversed(PRESETS.values())}
        known = of_kinds | PRESETS
        if text not in known:
            raise unknown("scheme", text, known)
        return known[text].scheme
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
        of_kind = (preset for preset in PRESETS.values() if preset.scheme.kind == kind)
        if (first := next(of_kind, None)) is not None:
            found[first.name] = first.scheme
    return found
