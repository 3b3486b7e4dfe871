"""The base class of a study's sections, which takes values as they are written or refuses them.

No value is rounded, parsed from text or converted from yes and no.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yields the types of values that an annotation allows, inside lists and mappings too."""
    if get_origin(annotation) is Literal:
        yield from (type(value) for value in get_args(annotation))
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from _leaves(part)
    elif isinstance(annotation, type):
        yield annotation


def _scalars(value: Any) -> Iterator[Any]:
    """Yields the scalar values inside nested lists and mappings."""
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
        value: The value in the file.
        annotation: The type of the field.

    Raises:
        ValueError: The value is text or yes/no for a number, a fraction for a whole number, NaN or
            infinite.
    """
    kinds = set(_leaves(annotation))
    if any(issubclass(kind, BaseModel) for kind in kinds) or not kinds & {int, float, bool}:
        return
    for one in _scalars(value):
        if isinstance(one, bool):
            if bool not in kinds:
                raise ValueError(f"{str(one).lower()} is not a number")
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


def without_defaults(section: Any, written: dict[str, Any]) -> dict[str, Any]:
    """Returns what is written of a section or record: without later options at their default.

    Args:
        section: Names them in its class variable `later`.
        written: All of its fields.
    """
    for name in section.later:
        if getattr(section, name) == type(section).model_fields[name].default:
            written.pop(name, None)
    return written


class Strict(BaseModel):
    """The base class of a study's sections, without unknown keys and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, raw: Any) -> Any:
        for name, value in raw.items() if isinstance(raw, dict) else ():
            if name in cls.model_fields:
                try:
                    refuse_lossy(value, cls.model_fields[name].annotation)
                except ValueError as error:
                    context = {"field": name, "reason": str(error)}
                    raise PydanticCustomError("lossy", "{reason}", context) from None
        return raw

    # Options that were added after results had been published. They are not serialized at their
    # default, so that the digests of earlier results stay the same.
    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, plain(self))
