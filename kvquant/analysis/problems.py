"""Reads a study's records and names all that cannot be used at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from kvquant.analysis.sources import Source, Sources
from kvquant.errors import UserError, printable
from kvquant.formats.files import canonical_json, sha256_text
from kvquant.study.cells import Cell
from kvquant.study.config import Study
from kvquant.study.plan import stale_line
from kvquant.study.records import Record

R = TypeVar("R", bound=Record)
# For each hash among a record's inputs: which of its fields say that it must be the same file.
SCOPES: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "statistics": ("model",),
    "quantizer": ("model", "scheme"),
    "prompts": ("model", "task", "seed"),
    "text": ("task",),
    "timed_text": (),  # of which prompts of throughput and energy are pieces
}


def _stale(source: Source, found: str, cell: Cell) -> str:
    if source.published is not None:
        return stale_line(source.where, found, cell)
    return (
        f"{source.where}: measured with another configuration (digest {printable(found)}, the "
        f"study has {cell.digest}): delete it by name and run again, or rename the changed entry"
    )


class Problems(list[str]):
    """The problems of a study's records, collected for one message.

    Args:
        present: Records that are not there yet are no problem: the study is unfinished.
    """

    def __init__(self, present: bool = False) -> None:
        super().__init__()
        self.present, self.missing = present, 0
        self._inputs: dict[tuple[Any, ...], tuple[str, str]] = {}
        self._measured: dict[str, str] = {}
        self.seals: list[str] = []

    def read(self, source: Source, cell: Cell, kind: type[R]) -> R | None:
        """Reads the record of a cell; None where there is none to use.

        Args:
            source: Where the record is.
            cell: Its specification, and the fields that its place names.
            kind: Type of the record.
        """
        if self.present and not source.there:
            self.missing += 1
            return None
        try:
            record = source.record(kind)
        except UserError as error:
            self.append(str(error))
            return None
        if record.spec_digest != cell.digest:
            self.append(_stale(source, record.spec_digest, cell))
            return None
        for name, value in cell.names.items():
            if (found := getattr(record, name)) != value:
                self.append(
                    f"{source.where}: field '{name}': is '{printable(found)}', but the file lies "
                    f"under '{value}': {source.again}"
                )
                return None
        if not self._same_inputs(source, record):
            return None
        self.seals.append(record.seal)
        return record

    def _same_inputs(self, source: Source, record: Record) -> bool:
        """Returns whether a record was measured with the same files as the records before it."""
        for what, found in record.inputs.items():
            if what not in SCOPES or not all(hasattr(record, name) for name in SCOPES[what]):
                continue
            key = (what, *(getattr(record, name) for name in SCOPES[what]))
            first, expected = self._inputs.setdefault(key, (source.where, found))
            if found != expected:
                self.append(
                    f"{source.where}: field 'inputs.{what}': was measured with another {what} than "
                    f"{first} ({printable(found[:12])}, not {printable(expected[:12])}): delete "
                    "the older one and run again"
                )
                return False
        return True

    def verified(
        self,
        sources: Sources,
        stage: str,
        kind: type[R],
        check: Callable[[Study, Any], None],
    ) -> Iterator[tuple[Source, R]]:
        """Yields each record of a stage that can be used, with where it is.

        Args:
            sources: The records of the study.
            stage: The kind of the records.
            kind: Their type.
            check: Refuses a record that is not what the study asks for (:meth:`fits`).
        """
        for cell in sources.cells(stage):
            source = sources.find(cell)
            record = self.read(source, cell, kind)
            if record is not None and self.fits(source, check, sources.study, record):
                yield source, record

    def fits(
        self, source: Source, check: Callable[[Study, Any], None], study: Study, record: Record
    ) -> bool:
        """Returns whether a record is what the study asks for."""
        try:
            check(study, record)
        except (ValueError, ArithmeticError) as error:
            self.append(f"{source.where}: {printable(error)}: {source.again}")
            return False
        return True

    def once(self, source: Source, what: str, measured: list[Any]) -> None:
        """Refuses measurements that are, to the last digit, those of another record."""
        if not measured:  # out of memory
            return
        key = sha256_text(canonical_json([what, measured]))
        first = self._measured.setdefault(key, source.where)
        if first != source.where:
            self.append(f"{source.where}: holds the measurements of {first}: {source.again}")
