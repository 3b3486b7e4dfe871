"""A study that measures published results again, which its section `reproduce:` asks for.

A study that publishes records does not measure them again. With that section it does, in folders of
its own, and `kvquant reproduce` compares what was measured with what is published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvquant.errors import UserError
from kvquant.study.archive import Archive
from kvquant.study.cells import Cell
from kvquant.study.config import Study
from kvquant.study.places import names_in_place

SUFFIX = "-again"  # of the folders for what is measured again
NEEDED = (
    "reproduce: say what is measured again: `--config reproduce=true` for every published "
    "accuracy, or a part of it, as `--config 'reproduce={tasks: [TASK], seeds: [0]}'`"
)


def measured_again(study: Study) -> Study:
    """Returns the study that measures again what a study with the section `reproduce` asks for.

    Published records do not count in it. Results, logs and the paper's parts go into folders of
    their own, so that nothing of the first study is replaced. Other studies are returned as given.

    Raises:
        UserError: There are no published records to compare with.
    """
    spec = study.reproduce
    if spec is None or (spec.published is not None and study.published is None):
        return study
    published = spec.published or study.published
    if published is None:
        raise UserError(
            "reproduce: the study has no published records to compare with: name their folder by "
            "`published`"
        )
    results = study.pathvars.get("results", "results/h100") + SUFFIX
    logs = study.pathvars.get("logs", "logs/h100") + SUFFIX
    folders = study.pathvars | {"results": results, "logs": logs, "paper": f"{results}/paper"}
    named = spec.model_copy(update={"published": published})
    again = {"published": None, "companions": {}, "pathvars": folders, "reproduce": named}
    return study.model_copy(update=again)


def measured_seeds(study: Study) -> list[int]:
    """Returns the seeds that evaluations measure, in the order of the study."""
    some = study.reproduce.seeds if study.reproduce is not None else []
    return [seed for seed in study.seeds if not some or seed in some]


def quantizers_from(study: Study) -> str | None:
    """Returns the folder of published records whose quantizers are taken; None to calibrate."""
    if study.reproduce is None:
        return study.published
    return study.reproduce.published if study.reproduce.quantizers == "published" else None


def same_result(stage: str, fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what identifies a result on any device.

    Args:
        stage: The kind of its record.
        fields: The record, or the fields that its place names.
    """
    return stage, *(fields.get(name) for name in names_in_place(stage) if name != "device")


def to_measure(study: Study, archive: Archive, cells: Iterable[Cell]) -> list[Cell]:
    """Returns the cells that are published, on any device, and selected to be measured again."""
    spec = study.reproduce
    assert spec is not None
    there = {same_result(str(r.content["kind"]), r.content) for r in archive.values()}
    return [
        cell
        for cell in cells
        if spec.selects(cell.stage, cell.names) and same_result(cell.stage, cell.names) in there
    ]
