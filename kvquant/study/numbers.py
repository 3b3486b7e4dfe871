"""Numbers of a study as they are written: nothing is rounded, parsed from text or read from yes/no.

The limits keep a typing error (a rep count of 10^12) from filling memory or a queue; each is far
beyond what a machine can measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

MAX_TOKENS = 2**24  # of a prompt, a window, a cache
MAX_BATCH = 2**16
MAX_SAMPLES = 100_000  # of a task and seed
MAX_WINDOWS = 1_000_000
MAX_REPS = 1_000
MAX_ROUNDS = 1_000_000
MAX_MINUTES = 60 * 24 * 30
MAX_SECONDS = 60.0 * MAX_MINUTES
MAX_NAMES = 1_000  # schemes, tasks, workloads, seeds
MAX_RESULTS = 1_000_000  # of a study


def _leaves(annotation: Any) -> Iterator[Any]:
    """Types of the values that an annotation allows, inside lists and mappings too."""
    if get_origin(annotation) is Literal:
        yield from (type(value) for value in get_args(annotation))
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from _leaves(part)
    elif isinstance(annotation, type):
        yield annotation


def _scalars(value: Any) -> Iterator[Any]:
    """Values inside lists and mappings."""
    if isinstance(value, dict):
        for part in value.values():
            yield from _scalars(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _scalars(part)
    else:
        yield value


def refuse_lossy(value: Any, annotation: Any) -> None:
    """Refuses a value that would be changed on its way into a field.

    Args:
        value: As the file has it.
        annotation: The field's type.

    Raises:
        ValueError: Text or yes/no for a number, a fraction for a whole number, NaN, an infinity.
    """
    kinds = set(_leaves(annotation))
    if any(issubclass(kind, BaseModel) for kind in kinds) or not kinds & {int, float, bool}:
        return
    for one in _scalars(value):
        if isinstance(one, bool):
            if bool not in kinds:
                raise ValueError(f"{str(one).lower()} is no number")
        elif isinstance(one, str):
            if str not in kinds:
                number = kinds & {int, float}
                wanted = "a number, without quotes or exponent" if number else "true or false"
                raise ValueError(f"'{one[:40]}' is text: write {wanted}")
        elif isinstance(one, int | float):
            if not kinds & {int, float}:
                raise ValueError(f"{one} is a number: write true or false")
            if isinstance(one, float) and not math.isfinite(one):
                raise ValueError(f"{one} is no finite number")
            if isinstance(one, float) and float not in kinds:
                raise ValueError(f"{one} is no whole number as written")
            if isinstance(one, int) and abs(one) > 10**18:
                raise ValueError("is beyond every number that a study can use")
