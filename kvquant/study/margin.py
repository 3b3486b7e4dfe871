"""The margin of equivalence per suite, in the study's section `statistics:`."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from kvquant.study.strict import Strict


class Margin(Strict):
    """The largest difference from the baseline that still counts as equivalent.

    The margin is the smaller of `relative` times the baseline's mean and `absolute`. A plain number
    stands for `absolute` alone.
    """

    relative: float | None = Field(
        0.05,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="margin as a share of the baseline's mean",
    )
    absolute: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="largest margin, in the unit of the metric"
    )
    floor: float = Field(
        10.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="points below which a baseline is too low to show a loss (not for perplexity)",
    )
    chance: float = Field(
        0.0, ge=0, lt=100, allow_inf_nan=False, description="points that guessing reaches"
    )

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        if isinstance(given, int | float) and not isinstance(given, bool):
            return {"relative": None, "absolute": given}
        return given

    @model_validator(mode="after")
    def _bounded(self) -> Margin:
        if self.relative is None and self.absolute is None:
            raise ValueError("needs the field 'relative' or 'absolute'")
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        plain = {"type": "number", "exclusiveMinimum": 0, "description": "`absolute` alone"}
        mapping = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [plain, dict(mapping)], "title": "Margin"}

    def half_width(self, baseline: float) -> float:
        """Returns the margin for a baseline with the given mean, in the unit of the metric.

        Args:
            baseline: Mean of the metric under the baseline; 0 gives a margin of 0 unless only
                `absolute` is set.
        """
        parts = [self.absolute] if self.absolute is not None else []
        if self.relative is not None:
            parts.append(self.relative * abs(baseline))
        return min(parts)

    def in_nats(self, perplexity: float) -> float:
        """Returns the margin of a perplexity as a difference of mean negative log likelihoods.

        A perplexity p that grows by the margin m has a mean that grows by log(1 + m / p).
        """
        return math.log1p(self.half_width(perplexity) / perplexity)
