"""Reads a study's records and names all that cannot be used at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kvquant.errors import UserError, printable
from kvquant.formats.files import canonical_json, sha256_text
from kvquant.study.config import Study
from kvquant.study.records import AGAIN, Record, absent, read_record

R = TypeVar("R", bound=Record)
# For each hash among a record's inputs: which of its fields say that it must be the same file.
SCOPES: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "statistics": ("model",),
    "quantizer": ("model", "scheme"),
    "prompts": ("model", "task", "seed"),
    "text": ("task",),
}


def _stale(file: Path, found: str, expected: str) -> str:
    return (
        f"{file}: measured with another configuration (digest {printable(found)}, the study has "
        f"{expected}): delete it by name and run again, or rename the changed entry"
    )


class Problems(list[str]):
    """The problems of a study's records, collected for one message.

    Args:
        present: Records that are not there yet are no problem: the study is unfinished.
    """

    def __init__(self, present: bool = False) -> None:
        super().__init__()
        self.present, self.missing = present, 0
        self._inputs: dict[tuple[Any, ...], tuple[Path, str]] = {}
        self._measured: dict[str, Path] = {}
        self.seals: list[str] = []

    def read(
        self, file: Path, kind: type[R], digest: str, names: Mapping[str, Any] | None = None
    ) -> R | None:
        """Reads a record of the specification with that digest; None where there is none to use.

        Args:
            file: Path of the record.
            kind: Type of the record.
            digest: Digest of the specification.
            names: Fields that the path names, which must be the record's own.
        """
        if self.present and absent(file):
            self.missing += 1
            return None
        try:
            record = read_record(file, kind)
        except UserError as error:
            self.append(str(error))
            return None
        if record.spec_digest != digest:
            self.append(_stale(file, record.spec_digest, digest))
            return None
        for name, value in (names or {}).items():
            if (found := getattr(record, name)) != value:
                self.append(
                    f"{file}: field '{name}': is '{printable(found)}', but the file lies under "
                    f"'{value}': {AGAIN}"
                )
                return None
        if not self._same_inputs(file, record):
            return None
        self.seals.append(record.seal)
        return record

    def _same_inputs(self, file: Path, record: Record) -> bool:
        """Returns whether a record was measured with the same files as the records before it."""
        for what, found in record.inputs.items():
            if what not in SCOPES or not all(hasattr(record, name) for name in SCOPES[what]):
                continue
            key = (what, *(getattr(record, name) for name in SCOPES[what]))
            first, expected = self._inputs.setdefault(key, (file, found))
            if found != expected:
                self.append(
                    f"{file}: field 'inputs.{what}': was measured with another {what} than {first} "
                    f"({printable(found[:12])}, not {printable(expected[:12])}): delete the older "
                    "one and run again"
                )
                return False
        return True

    def fits(
        self, file: Path, check: Callable[[Study, Any], None], study: Study, record: Record
    ) -> bool:
        """Returns whether a record is what the study asks for."""
        try:
            check(study, record)
        except (ValueError, ArithmeticError) as error:
            self.append(f"{file}: {printable(error)}: {AGAIN}")
            return False
        return True

    def once(self, file: Path, what: str, measured: list[Any]) -> None:
        """Refuses measurements that are, to the last digit, those of another record."""
        if not measured:  # out of memory
            return
        first = self._measured.setdefault(sha256_text(canonical_json([what, measured])), file)
        if first != file:
            self.append(f"{file}: holds the measurements of {first}: {AGAIN}")
