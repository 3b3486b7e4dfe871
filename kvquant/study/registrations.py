"""Tables of registrations, in which no name is given twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Named(Protocol):
    """A registration that has a name."""

    @property
    def name(self) -> str:
        """The name by which studies refer to it."""


Record = TypeVar("Record", bound=Named)


def by_name(records: Iterable[Record]) -> dict[str, Record]:
    """Returns registrations by their names, in the given order.

    Raises:
        ValueError: A name is registered twice.
    """
    found: dict[str, Record] = {}
    for record in records:
        if record.name in found:
            raise ValueError(f"'{record.name}' is registered twice")
        found[record.name] = record
    return found
