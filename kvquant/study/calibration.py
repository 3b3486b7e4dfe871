"""The study's section `calibration:`, which names the text and the statistics of codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from kvquant.study.limits import MAX_BATCH, MAX_SAMPLES, MAX_SEED, MAX_TOKENS
from kvquant.study.wording import Worded, short_count


class CalibrationSpec(Worded):
    """The text and the statistics from which non-uniform codebooks are built."""

    terms: ClassVar[Mapping[str, str]] = {
        "dataset": "calibration text",
        "windows": "calibration tokens",
        "window": "tokens per calibration window",
        "seed": "calibration seed",
        "sinks": "first tokens left out of calibration",
        "bins": "calibration bins per channel",
    }
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

    def value_in_words(self, option: str) -> str:
        """Returns the value of an option in words; windows of one length read as their tokens."""
        if option == "windows":
            return short_count(self.windows * self.window)
        return super().value_in_words(option)
