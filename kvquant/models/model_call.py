"""Reads the arguments of a call of a transformers module, in any supported release.

transformers 5.24 renamed the argument `past_key_values` of models, layers and attention to `cache`.
Arguments, positional ones included, are read by the signature of the called module, and the cache
is found by its type. Unknown arguments are refused by name, never ignored.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kvquant.cache.attending import AttendingCache
from kvquant.errors import UserError

CACHE_NAMES = ("cache", "past_key_values")  # newest first


@functools.lru_cache(maxsize=64)
def parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of a method's positional parameters, without `self`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in found if p.kind in kinds)[1:]


def arguments(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a method call by name.

    Args:
        names: Names of the parameters; see :func:`parameters`.
        args: Positional arguments, without `self`.
        kwargs: Keyword arguments.
    """
    return {**dict(zip(names, args, strict=False)), **kwargs}


def find_cache(given: Mapping[str, Any]) -> AttendingCache | None:
    """Returns the cache among the arguments that computes the attention itself, or None."""
    for name in CACHE_NAMES:  # rarely under another name
        if isinstance(cache := given.get(name), AttendingCache):
            return cache
    return next((value for value in given.values() if isinstance(value, AttendingCache)), None)


# What transformers' `generate` hands on to the model with stop strings, and no model reads.
UNREAD = frozenset({"tokenizer", "assistant_tokenizer"})


def refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses arguments that would otherwise be ignored.

    Args:
        given: Arguments by name; those that are None have no effect.
        known: Names of the supported arguments.

    Raises:
        UserError: An argument is unknown, or asks for what a quantized cache cannot give.
    """
    if given.get("output_attentions"):
        raise UserError(
            "output_attentions: the quantized cache has no attention weights to give; leave it "
            "out, or pass a cache of transformers"
        )
    for name, value in given.items():
        if name in known or name in UNREAD or value is None:
            continue
        if not isinstance(value, AttendingCache):
            raise UserError(
                f"{name}: this argument of the model is not known to the quantized cache; leave "
                "it out, or pass a cache of transformers"
            )


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Returns the keyword argument that passes a cache in the installed transformers."""
    forward = getattr(type(model), "forward", None)
    names = () if forward is None else parameters(forward)
    return {next((name for name in CACHE_NAMES if name in names), "past_key_values"): cache}
