"""The passkey heat map: a cell is the mean over the samples of its length and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvquant.analysis.figures import passkey
from kvquant.analysis.figures.style import plt
from kvquant.analysis.plot import draw_figure
from kvquant.errors import UserError
from kvquant.study.config import Study, parse_study
from tests.support.tables import write_tables


def study_of(*lengths: int) -> Study:
    return parse_study(
        {
            "study": "check",
            "models": {"tiny": {"source": "local", "path": "x"}},
            "schemes": {"fp16": {"kind": "fp16"}, "kivi-2": {"kind": "kivi", "bits": 2}},
            "headline": "kivi-2",
            "tasks": {
                f"passkey-{n}": {"suite": "passkey", "length": n, "samples": 20} for n in lengths
            },
        }
    )


def test_cells_are_means_over_length_and_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        # kivi-2 fails in the second half of the long prompts only.
        {"model": "tiny", "scheme": s, "task": f"passkey-{n}", "seed": seed, "sample": i}
        | {"score": float(not (s == "kivi-2" and n == 2048 and i >= 10))}
        for s in ("fp16", "kivi-2")
        for n in (1024, 2048)
        for seed in range(2)
        for i in range(20)
    ]
    monkeypatch.setattr(passkey, "read_table", lambda tables, name: pd.DataFrame(rows))
    figure = passkey.draw(study_of(2048, 1024), tmp_path)
    shown = {
        a.get_title(): np.asarray(a.collections[0].get_array())
        for a in figure.axes
        if a.get_title()
    }
    assert shown["16-bit cache"].shape == (10, 2) and (shown["16-bit cache"] == 100).all()
    assert (shown["KIVI 2 bits"][:, 0] == 100).all()
    assert (shown["KIVI 2 bits"][:5, 1] == 100).all() and (shown["KIVI 2 bits"][5:, 1] == 0).all()
    figure.savefig(tmp_path / "passkey.pdf")
    plt.close(figure)


def test_lengths_stand_once_below_each_column(tmp_path: Path) -> None:
    """Also where the last row is not full; the panels above have no ticks without numbers."""
    raw = study_of(1024, 2048).model_dump(mode="json")
    raw["schemes"] |= {f"kivi-2-g{n}": {"kind": "kivi", "bits": 2, "group": n} for n in (32, 64)}
    study = parse_study(raw)
    write_tables(study, tmp_path)
    figure = draw_figure("passkey", study, tmp_path)
    panels = [axis for axis in figure.axes if axis.get_visible() and axis.get_title()]
    assert len(panels) == 4  # three and one
    ticks = [axis.xaxis.get_major_ticks()[0] for axis in panels]
    assert [tick.tick1line.get_visible() for tick in ticks] == [False, True, True, True]
    assert [tick.label1.get_visible() for tick in ticks] == [False, True, True, True]
    assert [axis.get_xlabel() for axis in panels] == ["", "", "", "prompt tokens"]
    plt.close(figure)


def test_one_length_is_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passkey, "read_table", lambda tables, name: pd.DataFrame())
    with pytest.raises(UserError, match="fewer than two lengths"):
        draw_figure("passkey", study_of(1024), tmp_path)
