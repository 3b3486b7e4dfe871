"""The study's optional section `tracking:`, without torch; part of :mod:`kvquant.study.config`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvquant.study.strict import Strict


class TrackingSpec(Strict):
    """Where records are logged besides: one run per record, written to disk and never sent."""

    backend: Literal["wandb"] = Field("wandb", description="Weights & Biases, in offline mode")
    project: str = Field(
        "kvquant-prefill",
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        description="project of the runs, in which `wandb sync` puts them",
    )
