"""Verdicts: equal values, shares of ratios, and intervals against a margin.

Also covers: analysis.reproduction.tolerances.
"""

from __future__ import annotations

import pytest

from kvquant.analysis.reproduction.rows import Subject, by_interval, exact, ratio, shown
from kvquant.analysis.reproduction.tolerances import TOLERANCES

SUBJECT = Subject("eval", "tiny", "fp16", "ppl")


@pytest.mark.parametrize(
    ("ends", "inner", "verdict"),
    [
        ((-0.4, 0.6), (-0.3, 0.5), "reproduced"),
        ((-0.9, 1.1), (-0.7, 0.9), "reproduced"),  # the inner interval decides
        ((0.5, 1.5), (0.6, 1.4), "not enough evidence"),
        ((-3.0, 3.0), (-2.0, 2.0), "not enough evidence"),
        ((1.1, 2.0), (1.2, 1.9), "differs"),
        ((-2.0, -1.1), (-1.9, -1.2), "differs"),
        ((float("nan"),) * 2, (float("nan"),) * 2, "not enough evidence"),
    ],
)
def test_intervals(ends: tuple[float, float], inner: tuple[float, float], verdict: str) -> None:
    assert by_interval(ends, inner, 1.0, identical=False) == verdict
    assert by_interval(ends, inner, 1.0, identical=True) == "reproduced"


def test_exact_values() -> None:
    assert exact(SUBJECT, "cache bytes", 10, 10).verdict == "reproduced"
    row = exact(SUBJECT, "cache bytes", 10, 12)
    assert (row.verdict, row.difference, row.tolerance) == ("differs", 2.0, "equal")
    assert exact(SUBJECT, "bits per element", 0.3, 0.1 + 0.2).verdict == "reproduced"
    assert exact(SUBJECT, "status", "ok", "oom").verdict == "differs"


def test_ratios_may_be_off_by_a_share() -> None:
    name = "energy over baseline"
    assert ratio(SUBJECT, name, 0.5, 0.549).verdict == "reproduced"
    row = ratio(SUBJECT, name, 0.5, 0.44, (0.4, 0.5))
    assert row.verdict == "differs" and row.difference == pytest.approx(-0.12)
    assert (row.low, row.high) == (pytest.approx(-0.2), pytest.approx(0.0))
    assert ratio(SUBJECT, name, 0.0, 0.5).verdict == "not judged"


def test_what_is_shown_has_no_verdict() -> None:
    row = shown(SUBJECT, "time", 1.0, 3.0)
    assert (row.verdict, row.difference) == ("not judged", 2.0)


def test_tolerances_say_what_they_are() -> None:
    for rule in TOLERANCES.values():
        assert rule.text and rule.why, rule.name
        assert (rule.relative is not None) or rule.kind != "ratio", rule.name
    assert TOLERANCES["KL divergence"].text == (
        "±5% of the published value, at least 0.0002 nats per token"
    )
