"""The throughput figure: every mark lies in its scheme's row, and every row in the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis.figures import throughput
from kvquant.analysis.figures.style import FILLS, looks, plt
from kvquant.study.config import parse_study

SCHEMES = ("kivi-4", "kivi-3", "kivi-2")
NAMES = ["KIVI 4 bits", "KIVI 3 bits", "KIVI 2 bits"]


def fill(line: Any) -> tuple[str, str]:
    """How much of a marker is filled; of the legend's grey ones too."""
    return line.get_fillstyle(), "white" * (line.get_markerfacecolor() == "white")


@pytest.mark.parametrize("workloads", [1, 2, 9])
def test_marks_lie_in_their_rows(
    workloads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {s: {"kind": "kivi", "bits": int(s[-1])} for s in SCHEMES}
    study = parse_study(
        {
            "study": "check",
            "models": {"tiny": {"source": "local", "path": "x"}},
            "schemes": {"fp16": {"kind": "fp16"}, **named},
            "headline": "kivi-2",
            "tasks": {"passkey-1k": {"suite": "passkey", "length": 1024, "samples": 1}},
        }
    )
    # each scheme has a speed of its own, by which its marks are known again
    speed = {s: 1 + i for i, s in enumerate(SCHEMES)}
    rows = [
        {"scheme": s, "workload": f"w{w}"}
        | {f"{part}_ratio": float(speed[s]) for part in ("prefill", "decode")}
        | {f"base_{part}_ms_median": 100.0 for part in ("prefill", "decode")}
        | {f"scheme_{part}_ms_{p}": 100.0 / speed[s] for part in ("prefill", "decode")
           for p in ("p10", "p90")}
        for s in SCHEMES for w in range(workloads)
    ]  # fmt: skip
    monkeypatch.setattr(throughput, "read_table", lambda tables, name: pd.DataFrame(rows))
    figure = throughput.draw(study, tmp_path)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    legend = figure.legends[0]
    shown = {
        text.get_text(): fill(handle)
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    drawn = min(workloads, len(FILLS))  # the figure says that there are more
    assert list(shown) == [f"w{w}" for w in range(drawn)]
    assert len(set(shown.values())) == drawn
    assert ("first 6 of 9" in figure._supxlabel.get_text()) == (workloads == 9)
    for axis in figure.axes:  # the second shows the first one's names
        bottom, top = axis.get_ylim()
        assert (names, top, bottom) == (NAMES, -0.6, 2.6)
        marks = [bars.lines[0].get_xydata()[0] for bars in axis.containers]
        mine = [row for row in rows if row["workload"] in shown]
        assert len(marks) == len(mine)
        for row, bars in zip(mine, axis.containers, strict=True):
            assert fill(bars.lines[0]) == shown[row["workload"]]
            assert bars.lines[0].get_marker() == looks(study)[str(row["scheme"])][1]
        for x, y in marks:
            assert names[round(y)] == NAMES[int(x) - 1] and abs(y - round(y)) < 0.5
    figure.savefig(tmp_path / "throughput.pdf")
    plt.close(figure)
