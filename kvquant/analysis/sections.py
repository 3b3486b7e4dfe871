"""The sections of the report and of the paper, in their order."""

from __future__ import annotations

from enum import StrEnum


class Section(StrEnum):
    """A folder of the report, with the text that stands on it."""

    CLAIMS = "0 Claims"
    ACCURACY_AGAINST_COST = "1 Accuracy against cost"
    ACCURACY_BY_TASK = "2 Accuracy by task"
    THROUGHPUT = "3 Throughput"
    ENERGY = "4 Energy"
    STATISTICS = "5 Statistics"
    ABLATION = "6 Ablation"
