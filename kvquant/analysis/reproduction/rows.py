"""A row of the comparison: one quantity, published and measured again, and its verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvquant.analysis.reproduction.tolerances import TOLERANCES, Tolerance

REPRODUCED, DIFFERS, UNDECIDED = "reproduced", "differs", "not enough evidence"
NOT_RUN, SHOWN = "not run", "not judged"
VERDICTS = (REPRODUCED, DIFFERS, UNDECIDED, SHOWN, NOT_RUN)
EQUAL = 1e-9  # relative, by which machines round the same quotient differently


@dataclass(frozen=True)
class Subject:
    """What a row is about, and where both sides were measured.

    Attributes:
        stage: The kind of the records.
        model: Name of the model; empty for random weights.
        scheme: Name of the scheme, or of the case that holds several.
        what: The task, workload, case or size.
        results: Number of published results that the row rests on.
        quantizer: How the quantizers of both sides relate; empty without one.
        published_device: Device of the published results.
        own_device: Device of those measured again.
        published_versions: Software of the published results.
        own_versions: Software of those measured again.
    """

    stage: str
    model: str
    scheme: str
    what: str
    results: int = 1
    quantizer: str = ""
    published_device: str = ""
    own_device: str = ""
    published_versions: str = ""
    own_versions: str = ""


@dataclass(frozen=True)
class Row:
    """One quantity on both sides.

    Attributes:
        subject: What it is about.
        quantity: Its name among the tolerances; empty for what was not run.
        verdict: One of :data:`VERDICTS`.
        published: The published value.
        own: The value that was measured again.
        difference: Own minus published; of ratios as a share of the published value.
        low: Lower end of the difference's interval, if it has one.
        high: Upper end.
        unit: Unit of the values.
        difference_unit: Unit of the difference and its interval.
        tolerance: What counts as the same, in words.
        note: What else a reader must know.
    """

    subject: Subject
    quantity: str
    verdict: str
    published: Any = None
    own: Any = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    difference_unit: str = ""
    tolerance: str = ""
    note: str = field(default="")

    def as_dict(self) -> dict[str, Any]:
        """Returns the row for a table, in which values are text where they are no numbers."""
        plain = asdict(self)
        flat = {**plain.pop("subject"), **plain}
        for side in ("published", "own"):
            value = flat.pop(side)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            flat[side] = float(value) if number else None
            flat[f"{side}_text"] = "" if value is None else str(value)
        return flat


def exact(subject: Subject, quantity: str, published: Any, own: Any, note: str = "") -> Row:
    """Returns the row of a quantity that must be equal."""
    rule = TOLERANCES[quantity]
    numbers = all(isinstance(v, int | float) for v in (published, own))
    same = abs(own - published) <= EQUAL * abs(published) if numbers else own == published
    return Row(
        subject, quantity, REPRODUCED if same else DIFFERS, published, own,
        float(own - published) if numbers else None, unit=rule.unit, difference_unit=rule.unit,
        tolerance=rule.text, note=note,
    )  # fmt: skip


def ratio(
    subject: Subject,
    quantity: str,
    published: float,
    own: float,
    ends: tuple[float, float] | None = None,
    note: str = "",
) -> Row:
    """Returns the row of a ratio, whose tolerance is a share of the published one.

    Args:
        subject: What it is about.
        quantity: Its name among the tolerances.
        published: The published ratio.
        own: The ratio that was measured again.
        ends: Lowest and highest of the own rounds or trials, which are shown.
        note: What else a reader must know.
    """
    rule = TOLERANCES[quantity]
    assert rule.relative is not None
    if published <= 0:
        return shown(subject, quantity, published, own, "there is no published ratio to share")
    off = own / published - 1
    low, high = (None, None) if ends is None else (end / published - 1 for end in ends)
    verdict = REPRODUCED if abs(off) <= rule.relative else DIFFERS
    return Row(
        subject, quantity, verdict, published, own, off, low, high, rule.unit,
        "of the published value", rule.text, note,
    )  # fmt: skip


def shown(subject: Subject, quantity: str, published: Any, own: Any, note: str = "") -> Row:
    """Returns the row of a quantity that is shown and not judged."""
    rule: Tolerance = TOLERANCES[quantity]
    difference = None if published is None or own is None else float(own - published)
    return Row(
        subject, quantity, SHOWN, published, own, difference, unit=rule.unit,
        difference_unit=rule.unit, tolerance="none: not judged", note=note,
    )  # fmt: skip


def by_interval(
    ends: tuple[float, float], inner: tuple[float, float], margin: float, identical: bool
) -> str:
    """Returns the verdict of a mean difference with its interval.

    "reproduced": the inner interval lies inside the margin (two one-sided tests), or every pair is
    equal, so that the published number itself came out again. "differs": the interval lies wholly
    outside the margin. Else the samples are too few to tell.

    Args:
        ends: Of the interval of level 1 - alpha.
        inner: Of the interval of level 1 - 2 alpha.
        margin: Of equivalence, on both sides of zero.
        identical: Whether no pair differs.
    """
    if identical or (-margin < inner[0] and inner[1] < margin):
        return REPRODUCED
    return DIFFERS if ends[0] > margin or ends[1] < -margin else UNDECIDED
