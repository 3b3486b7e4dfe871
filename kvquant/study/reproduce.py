"""The study's section `reproduce:`, by which published results are measured again.

What follows from it for a run is in :mod:`kvquant.study.measured_again`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from kvquant.study.limits import MAX_NAMES
from kvquant.study.paths import MaybePath
from kvquant.study.strict import Strict

Stage = Literal["eval", "throughput", "energy", "append", "kernels", "jobs"]


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
