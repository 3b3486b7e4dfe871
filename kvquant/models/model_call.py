"""What a call of a transformers module was given, whatever the installed release names it.

transformers 5.24 renamed the argument `past_key_values` of models, layers and attention to `cache`.
Arguments are read by the signature of the module that is called, positional ones included, and the
cache is found by its type; what nobody here knows is refused by name, never ignored.
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
    """Names of a method's parameters that may be given by position, without `self`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in found if p.kind in kinds)[1:]


def arguments(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a method call by name.

    Args:
        names: See :func:`parameters`.
        args: Positional arguments, without `self`.
        kwargs: Keyword arguments.
    """
    return {**dict(zip(names, args, strict=False)), **kwargs}


def find_cache(given: Mapping[str, Any]) -> AttendingCache | None:
    """The cache among the arguments that does the attention itself, or None."""
    for name in CACHE_NAMES:  # seldom elsewhere
        if isinstance(cache := given.get(name), AttendingCache):
            return cache
    return next((value for value in given.values() if isinstance(value, AttendingCache)), None)


def refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses arguments that would be ignored.

    Args:
        given: Arguments by name; those that are None say nothing.
        known: Names that are understood.

    Raises:
        UserError: An argument is not known, or asks for what a quantized cache cannot give.
    """
    if given.get("output_attentions"):
        raise UserError(
            "output_attentions: the quantized cache has no attention weights to give; leave it "
            "out, or pass a cache of transformers"
        )
    for name, value in given.items():
        if name not in known and value is not None and not isinstance(value, AttendingCache):
            raise UserError(
                f"{name}: this argument of the model is not known to the quantized cache; leave "
                "it out, or pass a cache of transformers"
            )


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that passes a cache to a model of the installed transformers."""
    forward = getattr(type(model), "forward", None)
    names = () if forward is None else parameters(forward)
    return {next((name for name in CACHE_NAMES if name in names), "past_key_values"): cache}
