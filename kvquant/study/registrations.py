"""Tables of registrations, in which no name is given twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar, get_args

from pydantic import BaseModel


class Named(Protocol):
    """A registration that has a name."""

    @property
    def name(self) -> str:
        """The name by which studies refer to it."""


Record = TypeVar("Record", bound=Named)


def register(records: dict[str, Record], record: Record) -> None:
    """Adds a registration to those of its kind.

    Raises:
        ValueError: The name is registered already.
    """
    if record.name in records:
        raise ValueError(f"'{record.name}' is registered twice")
    records[record.name] = record


def only_value(options: type[BaseModel], field: str) -> str:
    """Returns the only value that a field may have, by which its class is known in a study."""
    (value,) = get_args(options.model_fields[field].annotation)
    return str(value)


def by_name(records: Iterable[Record]) -> dict[str, Record]:
    """Returns registrations by their names, in the given order.

    Raises:
        ValueError: A name is registered twice.
    """
    found: dict[str, Record] = {}
    for record in records:
        register(found, record)
    return found
