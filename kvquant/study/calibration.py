"""The study's section `calibration:`, which names the text and the statistics of codebooks."""

from __future__ import annotations

from pydantic import Field

from kvquant.study.limits import MAX_BATCH, MAX_SAMPLES, MAX_SEED, MAX_TOKENS
from kvquant.study.strict import Strict


class CalibrationSpec(Strict):
    """The text and the statistics from which non-uniform codebooks are built."""

    dataset: str = Field("essays", description="text that the windows are cut from")
    windows: int = Field(16, ge=1, le=MAX_SAMPLES, description="number of calibration windows")
    window: int = Field(2048, ge=32, le=MAX_TOKENS, description="tokens per window")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="chooses where the windows begin")
    sinks: int = Field(
        1, ge=0, le=MAX_TOKENS, description="first tokens of each window that are left out"
    )
    bins: int = Field(
        1024, ge=64, le=MAX_BATCH, multiple_of=4, description="histogram bins per key channel"
    )
    outlier_fractions: list[float] = Field(
        [0.0, 0.01, 0.02], description="outlier fractions of values that schemes may use"
    )
