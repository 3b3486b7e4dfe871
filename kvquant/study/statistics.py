"""The study's section `statistics:`, without torch; part of :mod:`kvquant.study.config`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kvquant.study.margin import Margin
from kvquant.study.strict import Strict
from kvquant.study.tasks import SUITES

if TYPE_CHECKING:
    SuiteName = str
else:
    SuiteName = Literal[tuple(SUITES)]


def _margins() -> dict[SuiteName, Margin]:
    return {name: suite.margin for name, suite in SUITES.items()}


class StatisticsSpec(Strict):
    """Settings of the comparison of schemes with the baseline."""

    alpha: float = Field(0.05, gt=0, lt=1, description="significance level of the tests")
    margins: dict[SuiteName, Margin] = Field(
        default_factory=_margins,
        description="equivalence margin of each suite",
    )
    bootstrap: int = Field(2000, ge=100, le=100_000, description="draws of bootstrap intervals")
