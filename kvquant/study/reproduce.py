"""The study's section `reproduce:`, by which published results are measured again.

A study that publishes records does not measure them again. With this section it does, in folders of
its own, and `kvquant reproduce` compares what was measured with what is published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from kvquant.errors import UserError
from kvquant.study.limits import MAX_NAMES
from kvquant.study.paths import MaybePath
from kvquant.study.places import names_in_place
from kvquant.study.strict import Strict

if TYPE_CHECKING:
    from kvquant.study.archive import Archive
    from kvquant.study.cells import Cell
    from kvquant.study.config import Study

Stage = Literal["eval", "throughput", "energy", "append", "kernels", "jobs"]
SUFFIX = "-again"  # of the folders for what is measured again
NEEDED = (
    "reproduce: say what is measured again: `--config reproduce=true` for every published "
    "accuracy, or a part of it, as `--config 'reproduce={tasks: [TASK], seeds: [0]}'`"
)


class ReproduceSpec(Strict):
    """Which published results are measured again; `true` stands for all accuracies."""

    published: MaybePath = Field(
        None, description="folder of the records to compare with; default: the study's `published`"
    )
    stages: list[Stage] = Field(["eval"], min_length=1, description="kinds of results")
    schemes: list[str] = Field(
        [], max_length=MAX_NAMES, description="of accuracy, throughput and energy; empty: all"
    )
    tasks: list[str] = Field([], max_length=MAX_NAMES, description="of accuracy; empty: all")
    seeds: list[int] = Field([], max_length=MAX_NAMES, description="of accuracy; empty: all")
    quantizers: Literal["published", "own"] = Field(
        "published",
        description="measure with the published quantizers, or calibrate again; those that are not "
        "published are always calibrated",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_command_line(cls, given: Any) -> Any:
        """Takes `true` and seeds also as text, which Snakemake's `--config` makes of them."""
        if given is True or given == "true":
            return {}
        if isinstance(given, dict) and isinstance(seeds := given.get("seeds"), list):
            plain = [int(s) if isinstance(s, str) and s.isdecimal() else s for s in seeds]
            return given | {"seeds": plain}
        return given

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        everything = {"const": True, "description": "every published accuracy"}
        mapping = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [everything, dict(mapping)], "title": "ReproduceSpec"}

    def selects(self, stage: str, names: Mapping[str, Any]) -> bool:
        """Returns whether a result is measured again.

        Args:
            stage: The kind of its record.
            names: The record's fields that its place names.
        """
        chosen: dict[str, list[Any]] = {
            "scheme": list(self.schemes),
            "task": list(self.tasks),
            "seed": list(self.seeds),
        }
        return stage in self.stages and all(
            not some or field not in names or names[field] in some for field, some in chosen.items()
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
    again = {"published": None, "pathvars": folders, "reproduce": named}
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
