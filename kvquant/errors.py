"""Errors that the user sees as a single line without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Raised for invalid input, with a message of one line that names the field and the fix."""


class MissingPackage(UserError):
    """Raised when a package, or a release of one, that is needed is not installed."""


class NonFinite(UserError):
    """Raised when logits, losses or gradients are NaN or infinite, so that nothing is scored."""


class NonFiniteTokens(NonFinite, ValueError):
    """Raised when keys or values are NaN, infinite or beyond the range of the cache's dtype."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: NaN or Inf in the input (fp16 overflows beyond 65504)")


class OutlierOverflow(RuntimeError):
    """Raised when outliers exceed a cache's room, which `KVQuantCache.widen` increases."""


def printable(text: object) -> str:
    """Returns a text on one line, with line ends and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns an error for an unknown name that offers the nearest known ones.

    Args:
        kind: The kind of thing that the name denotes ("scheme", "task", "model", ...).
        name: The given name.
        known: All valid names.
    """
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(options)}"
    return UserError(f"unknown {kind} '{name}': {hint}")
