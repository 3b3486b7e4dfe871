"""The one error type that is shown to a user as a single line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the field and the fix; the CLI prints it without a traceback."""


class MissingPackage(UserError):
    """What was asked for needs a package, or a release of one, that is not installed."""


class NonFinite(UserError):
    """Logits, losses or gradients that are NaN or infinite; nothing is scored from them."""


class NonFiniteTokens(NonFinite, ValueError):
    """Keys or values that are NaN or infinite, or beyond what the 16 bits of a cache hold."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: NaN or Inf in the input (fp16 overflows beyond 65504)")


class OutlierOverflow(RuntimeError):
    """Outliers found no room in a cache; `KVQuantCache.widen` makes more for the next one."""


def printable(text: object) -> str:
    """A text on one line: line ends and other characters that cannot be shown are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for an unknown name that offers the nearest known ones.

    Args:
        kind: What the name should have been ("scheme", "task", "model", ...).
        name: The name that was given.
        known: All valid names.
    """
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(options)}"
    return UserError(f"unknown {kind} '{name}': {hint}")
