"""Verdicts need evidence; pages of the report escape what they show.

Also covers: analysis.report, analysis.sections, runtime.run_end.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvquant.analysis.evidence import (
    NOT_ENOUGH,
    NOT_MEASURED,
    NOT_SUPPORTED,
    SUPPORTED,
    Outcome,
    against_bar,
    interval,
    not_measured,
)
from kvquant.analysis.report import whole
from kvquant.runtime.run_end import claim_lines

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("low", "high", "met"),
    [(0, 0.9, True), (1.1, 2, False), (0.5, 1.5, None), (NAN, 0.5, None), (0, INF, None)],
)
def test_an_interval_lies_on_one_side_of_the_bar(low: float, high: float, met: bool | None) -> None:
    assert against_bar(low, high, 1.0, at_most=True) is met
    assert against_bar(-high, -low, -1.0, at_most=False) is met


def test_little_evidence_gives_no_verdict() -> None:
    assert Outcome("1", True, "5 prompts", enough=False).verdict == NOT_ENOUGH
    assert Outcome("1", None, "500 prompts").verdict == NOT_ENOUGH
    assert Outcome("1", True, "500 prompts").verdict == SUPPORTED
    assert Outcome("1", False, "500 prompts").verdict == NOT_SUPPORTED
    assert not_measured("no task").verdict == NOT_MEASURED
    assert np.isnan(interval(np.array([1.0]), 0.05)).all()
    assert np.isnan(interval(np.array([1.0, NAN]), 0.05)).all()


@pytest.mark.fault(
    "workflow",
    "a report that was cut short",
    "seen, and made again",
)
def test_a_report_that_was_cut_is_not_whole(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert not whole(report)
    report.write_text("<html><body>")
    assert not whole(report)
    report.write_text("<html></html>")
    assert whole(report)
    assert claim_lines(tmp_path / "none.csv") == []
