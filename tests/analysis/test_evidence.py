"""Verdicts need evidence; pages of the report escape what they show.

Also covers: analysis.bars, analysis.report, analysis.sections, runtime.run_end.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvquant.analysis.bars import Bar
from kvquant.analysis.claim_list import CLAIMS
from kvquant.analysis.evidence import (
    NOT_ENOUGH,
    NOT_MEASURED,
    NOT_SUPPORTED,
    SUPPORTED,
    Outcome,
    interval,
    not_measured,
)
from kvquant.analysis.report import whole
from kvquant.runtime.run_end import claim_lines, result_lines

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("low", "high", "met"),
    [(0, 0.9, True), (1.1, 2, False), (0.5, 1.5, None), (NAN, 0.5, None), (0, INF, None)],
)
def test_an_interval_lies_on_one_side_of_the_bar(low: float, high: float, met: bool | None) -> None:
    assert Bar(1.0, at_most=True).met(low, high) is met
    assert Bar(-1.0, at_most=False).met(-high, -low) is met


def test_little_evidence_gives_no_verdict() -> None:
    assert Outcome("1", True, 5, "prompts", enough=False).verdict == NOT_ENOUGH
    assert Outcome("1", True, 0, "prompts").verdict == NOT_ENOUGH
    assert Outcome("1", None, 500, "prompts").verdict == NOT_ENOUGH
    assert Outcome("1", True, 500, "prompts").verdict == SUPPORTED
    assert Outcome("1", False, 500, "prompts").verdict == NOT_SUPPORTED
    assert Outcome("1", True, 1500, "prompts").evidence == "1,500 prompts"
    assert not_measured("no task").verdict == NOT_MEASURED
    assert np.isnan(interval(np.array([1.0]), 0.05)).all()
    assert np.isnan(interval(np.array([1.0, NAN]), 0.05)).all()


def test_bars_read_as_they_are_judged() -> None:
    assert str(Bar(0.55, at_most=True)) == "at most 0.55"
    assert str(Bar(3.0, at_most=False)) == "at least 3"
    for claim in CLAIMS.values():
        assert str(claim.bar) in claim.definition and claim.least in claim.definition
        number = f"{claim.bar.limit:g}"
        assert number in str(claim.bar) or claim.bar.limit != claim.bar.limit


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


def test_a_study_that_measures_no_claim_says_so_once(tmp_path: Path) -> None:
    file = tmp_path / "claims.csv"
    rows = ["a,any,not measured here,no task", "b,any,not measured here,no task"]
    file.write_text("\n".join(["claim,model,verdict,measured", *rows]))
    assert claim_lines(file) == [f"  not measured here    all 2, for the reasons in {file}"]
    file.write_text("\n".join(["claim,model,verdict,measured", *rows, "c,any,supported,5 %"]))
    assert len(claim_lines(file)) == 3 and claim_lines(file)[2].endswith(
        "supported            c: 5 %"
    )


def test_results_of_few_tasks_end_a_run(tmp_path: Path) -> None:
    head = "model,level,task,scheme,baseline_mean,mean,difference,verdict"
    rows = [
        "m,task,ppl,a,30.5,30.75,0.25,worse",
        "m,suite,ppl,a,30.5,31,0.5,worse",
        "m,task,asked,a,80,90,10,inconclusive",
    ]
    (tmp_path / "tests.csv").write_text("\n".join([head, *rows]))
    pareto = "model,scheme,bits_per_element\nm,fp16,16\nm,a,4.5\n"
    (tmp_path / "pareto.csv").write_text(pareto)
    assert result_lines(tmp_path, "fp16") == [
        "  fp16  16.00 bits  ppl 30.5                  asked 80",
        "  a      4.50 bits  ppl 30.75 (+0.25, worse)  asked 90 (+10, inconclusive)",
    ]
    many = [f"m,task,t{n},a,1,1,0,identical" for n in range(5)]
    (tmp_path / "tests.csv").write_text("\n".join([head, *many]))
    assert result_lines(tmp_path, "fp16") == []
    (tmp_path / "tests.csv").write_text("nothing")
    assert result_lines(tmp_path, "fp16") == []
