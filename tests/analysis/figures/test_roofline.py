"""The roofline: operations by shape, bytes and times by record, roofs by the copy and the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis.figures import roofline
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from tests.support.studies import study_of

MACS = 2 * 16384 * 4096  # of keys and of values, of one sequence of 7B's 32 heads of 128
STUDY = study_of(
    kernels={"cases": {"a": {"shape": "7b-mha", "tokens": 16384, "measure": ["attention"]}}}
)


def table(**changed: Any) -> pd.DataFrame:
    rows = []
    for side, role, times, size in (
        ("nuq3", "ours", 1.0, 1.0), ("cudnn", "fp16", 2.0, 4.0), ("flash", "fp16", 3.0, 4.0),
    ):  # fmt: skip
        row: dict[str, Any] = {"device": "gpu", "case": "a", "shape": "7b-mha", "scheme": "nuq3"}
        row |= {"batch": 1, "tokens": 16384, "measure": "attention", "side": side, "role": role}
        row |= {f"ms_{p}": times * f for p, f in (("median", 1), ("p10", 0.9), ("p90", 1.2))}
        row |= {"nbytes": size * 2**26, "copy_gb_per_s": 3000.0}
        row["slots_per_element"] = 10.0 if role == "ours" else None
        rows.append(row | changed)
    return pd.DataFrame(rows)


def test_points_follow_from_shape_bytes_and_times() -> None:
    ours = roofline.points(table()).iloc[0]
    assert ours.intensity == pytest.approx(2 * MACS / 2**26) == pytest.approx(4.0)
    assert ours.rate == pytest.approx(2 * MACS / 1e-3)
    assert (ours.rate_low, ours.rate_high) == pytest.approx((ours.rate / 1.2, ours.rate / 0.9))
    # in a millisecond 10 instructions could be issued for each element, each two operations
    assert ours.issue == pytest.approx(2 * 10 * MACS / 1e-3)


def test_fp16_is_its_fastest_backend_and_roofs_are_recorded_ones(tmp_path: Path) -> None:
    write_table(table(), tmp_path / "kernels.parquet")
    figure = roofline.draw(STUDY, tmp_path)
    (axis,) = figure.axes
    assert len(axis.containers) == 2
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["NUQ 3 bits, 1 % outliers", "fp16, cuDNN"]
    assert [text.get_text() for text in axis.texts] == ["a device copy", "without tensor cores"]
    roof = axis.lines[0]
    x, y = roof.get_data()
    assert y[0] / x[0] == pytest.approx(3e12)
    assert y[-1] == pytest.approx(2 * 10 * MACS / 1e-3)


def test_without_a_recorded_clock_there_is_no_level(tmp_path: Path) -> None:
    write_table(table(slots_per_element=float("nan")), tmp_path / "kernels.parquet")
    (axis,) = roofline.draw(STUDY, tmp_path).axes
    assert [text.get_text() for text in axis.texts] == ["a device copy"]
    x, y = axis.lines[0].get_data()
    assert y[-1] / x[-1] == pytest.approx(3e12)


def test_without_attention_there_is_nothing_to_draw(tmp_path: Path) -> None:
    write_table(table(measure="pack"), tmp_path / "kernels.parquet")
    with pytest.raises(UserError, match="no decode attention was timed"):
        roofline.draw(STUDY, tmp_path)
