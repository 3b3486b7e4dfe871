"""Decides what a run measures: what is published needs no job, the rest needs a fitting machine.

A study that publishes records (`published`) is rebuilt from them on any machine. What is missing is
measured where the study's device is, and is left out of tables and figures elsewhere. A study that
publishes nothing is planned whole. One that reproduces published results
(:mod:`kvquant.study.measured_again`) plans those that it asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvquant.errors import UserError, printable
from kvquant.study.archive import Archive, read_archive
from kvquant.study.cells import STAGES, Cell, cells_of
from kvquant.study.config import Study
from kvquant.study.measured_again import to_measure

SHOWN = 5  # records in one message


@dataclass(frozen=True)
class Plan:
    """What a run takes from published records, and what it measures or leaves out.

    Attributes:
        study: The study.
        published: Cells with a published record.
        finished: Cells whose job has finished in this results folder.
        absent: Cells that nobody has measured yet.
        elsewhere: Number of published records of other devices, which tables show, too.
    """

    study: Study
    published: list[Cell]
    finished: list[Cell]
    absent: list[Cell]
    elsewhere: int = 0

    def files(self, stage: str, obstacle: str = "") -> list[str]:
        """Returns the places of a stage's records that are, or will be, in the results folder.

        Args:
            stage: The kind of the records.
            obstacle: Why this machine cannot measure (:func:`obstacle`); empty if it can.
        """
        cells = self.finished if obstacle else [*self.finished, *self.absent]
        return [cell.place for cell in cells if cell.stage == stage]

    def line(self, obstacle: str = "") -> str:
        """Returns one line on where the results of the study come from."""
        if (again := self.study.reproduce) is not None:
            asked = len(self.finished) + len(self.absent)
            told = f"Measuring {asked:,} published results of {again.published} again"
            return f"{told}: {len(self.finished):,} are there, {len(self.absent):,} are missing"
        total = len(self.published) + len(self.finished) + len(self.absent)
        parts = [f"{len(self.published):,} are published in {self.study.published}"]
        if self.finished:
            parts.append(f"{len(self.finished):,} were measured here")
        left = f"{len(self.absent):,} are missing"
        if self.absent and obstacle:
            parts.append(f"{left} and left out: {obstacle}")
        else:
            parts.append(f"{left} and planned" if self.absent else "none is missing")
        found = f"Of {total:,} results of the study '{self.study.study}', {', '.join(parts)}"
        more = f"{self.elsewhere:,} more are published of other devices"
        return f"{found}; {more}" if self.elsewhere else found


def obstacle(study: Study, here: str, elsewhere: bool) -> str:
    """Returns why the jobs of a study cannot measure, or an empty text if they can.

    A study that publishes nothing is planned whole on any machine.

    Args:
        study: The study.
        here: The name of this machine's GPU, or "cpu" without one.
        elsewhere: Whether jobs are submitted to other machines.
    """
    compared = study.published is not None or study.reproduce is not None
    if study.gpus == 0 or elsewhere or not compared:
        return ""
    if here == "cpu":
        again = "; --config gpus=0 device=cpu measures on the processor, accuracy at least"
        return "this machine has no GPU" + (again if study.reproduce is not None else "")
    if study.device in ("auto", here):
        return ""
    return (
        f"this machine's GPU is {here}, not {study.device}; --config device={here} measures under "
        "its own name"
    )


def published_places(archive: Archive, cells: Iterable[Cell]) -> set[str]:
    """Returns the places of the cells that are published.

    Raises:
        UserError: A record was published with another configuration.
    """
    found: set[str] = set()
    stale = []
    for cell in cells:
        record = archive.get(cell.place)
        if record is None:
            continue
        found.add(cell.place)
        if record.digest != cell.digest:
            stale.append(stale_line(record.where, record.digest, cell))
    if stale:
        more = f"and {len(stale) - SHOWN} more: is --replace-workflow-config missing?"
        raise UserError("\n".join(stale[:SHOWN] + [more] * (len(stale) > SHOWN)))
    return found


def _of_others(study: Study, archive: Archive, device: str) -> int:
    """Returns the number of published records that the study asks for, of other devices."""
    devices = {str(r.content.get("device", device)) for r in archive.values()} - {device}
    timed = [stage for stage in STAGES if stage != "eval"]  # whose places name the device
    cells = [c for name in devices for stage in timed for c in cells_of(study, stage, name)]
    return len({cell.place for cell in cells} & archive.keys())


def stale_line(where: object, found: str, cell: Cell) -> str:
    """Returns the message on a published record of another configuration than the study's."""
    return (
        f"{where}: {cell.place}: measured with another configuration (digest {printable(found)}, "
        f"the study has {cell.digest}): give the changed entry a new name, or measure a study of "
        "its own (`published: null`)"
    )


def make_plan(study: Study, device: str, results: str | Path) -> Plan:
    """Returns what a run of a study takes from published records, and what is left to measure.

    Args:
        study: The study.
        device: The device under whose name is timed.
        results: The study's results folder.

    Raises:
        UserError: A published record was changed, or is of another configuration.
    """
    cells = [cell for stage in STAGES for cell in cells_of(study, stage, device)]
    archive: Archive = read_archive(study.published) if study.published is not None else {}
    if study.reproduce is not None and study.reproduce.published is not None:
        cells = to_measure(study, read_archive(study.reproduce.published), cells)
    there = published_places(archive, cells)
    plan = Plan(study, [], [], [], _of_others(study, archive, device))
    for cell in cells:
        if cell.place in there:
            plan.published.append(cell)
        else:
            done = (Path(results) / cell.place).exists()
            (plan.finished if done else plan.absent).append(cell)
    return plan
