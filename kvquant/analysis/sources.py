"""Where collected records come from: the files of finished jobs, and published records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvquant.errors import UserError
from kvquant.formats.files import parse_json, read_text
from kvquant.study.archive import RESTORE, Archive, Published, read_archive
from kvquant.study.cells import Cell, cells_of
from kvquant.study.config import Study
from kvquant.study.records import AGAIN, Record, absent, parse_record, read_record

R = TypeVar("R", bound=Record)
MEASURE_BOTH = "delete it and run.json beside it to measure the seed again"


@dataclass(frozen=True)
class Source:
    """A record that was found: a job's own file, or a published record.

    Attributes:
        where: Its file, and line if it is published, for messages.
        file: The job's file.
        published: The published record, which counts where there are both.
    """

    where: str
    file: Path
    published: Published | None = None

    @property
    def again(self) -> str:
        """Returns what a user does about a record that was changed."""
        return AGAIN if self.published is None else RESTORE

    @property
    def there(self) -> bool:
        """Returns whether there is a record."""
        return self.published is not None or not absent(self.file)

    def record(self, kind: type[R]) -> R:
        """Reads and verifies the record.

        Raises:
            UserError: It is missing or damaged, or a job's file is not the published record.
        """
        if self.published is None:
            return read_record(self.file, kind)
        record = parse_record(self.published.text, kind, self.where, self.again)
        if not absent(self.file) and _seal(self.file) != record.seal:
            raise UserError(
                f"{self.file}: is another record than the published one ({self.where}): delete it "
                "by name, or give the changed entry of the study a new name"
            )
        return record

    def samples(self) -> tuple[str, str, str]:
        """Returns the samples' text, their name for messages, and how to get them again."""
        if self.published is not None:
            return self.published.samples, self.where, RESTORE
        lines = self.file.with_name("samples.jsonl")
        text = "" if absent(lines) else read_text(lines, "samples", MEASURE_BOTH)
        return text, str(lines), MEASURE_BOTH


def _seal(file: Path) -> object:
    """Returns the seal that a job's file holds; None for a file that is no record."""
    try:
        raw = parse_json(read_text(file, "record", AGAIN))
    except ValueError:
        return None
    return raw.get("seal") if isinstance(raw, dict) else None


class Sources:
    """The records of a study.

    Args:
        study: The study, which names the folder of its published records.
        results: Its results folder.
        device: The device of what is timed in that folder.

    Raises:
        UserError: Published records are not as they were published.
    """

    def __init__(self, study: Study, results: Path, device: str) -> None:
        self.study, self.results, self.device = study, results, device
        self.archive: Archive = {} if study.published is None else read_archive(study.published)

    def find(self, cell: Cell) -> Source:
        """Returns where the record of a cell is, or should be."""
        file, published = self.results / cell.place, self.archive.get(cell.place)
        return Source(str(file) if published is None else published.where, file, published)

    def devices(self, stage: str) -> list[str]:
        """Returns the devices that a stage was measured on: this study's, then published ones."""
        found = [str(r.content["device"]) for r in self.archive.values() if self._of(r, stage)]
        return list(dict.fromkeys([self.device, *sorted(found)]))

    def cells(self, stage: str) -> list[Cell]:
        """Returns the cells of a stage: all of this device, and those of others that there are."""
        own, *others = [self.device] if stage == "eval" else self.devices(stage)
        more = [c for name in others for c in cells_of(self.study, stage, name)]
        return [*cells_of(self.study, stage, own), *(c for c in more if c.place in self.archive)]

    @staticmethod
    def _of(record: Published, stage: str) -> bool:
        return record.content["kind"] == stage
