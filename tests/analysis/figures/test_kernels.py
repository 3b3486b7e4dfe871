"""The figure `kernels` from records: what stands where, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvquant.analysis.cost_rows import kernel_rows
from kvquant.analysis.labels import TIMES, labels_of
from kvquant.analysis.plot import draw_figure
from kvquant.analysis.problems import Problems
from kvquant.analysis.sources import Sources
from kvquant.analysis.tables import write_table
from kvquant.benchmarks.turns import Role, Side, Status, to_records
from kvquant.errors import UserError
from kvquant.study.config import Study, load_study
from kvquant.study.digests import kernels_digest
from kvquant.study.records import KernelPart, KernelRecord, write_record

MS = {"ours": 2.0, "fp16": 3.0, "flash": 5.0, "cudnn": 4.0, "efficient": 6.0, "copy": 1.0}
SLOW = {"hf-hqq-4": 10.0, "kvquant-ref3-1pct": 20.0}


def sides(measure: str, peers: list[str]) -> list[Side]:
    """Sides with times that vary by 10 % from round to round."""
    whole: list[tuple[str, Role]] = [("fp16", "fp16"), ("nuq3-1pct", "ours")]
    kernel: list[tuple[str, Role]] = [("copy", "copy"), ("nuq3-1pct", "ours")]
    backends: list[tuple[str, Role]] = [(n, "fp16") for n in ("flash", "cudnn", "efficient")]
    by_bytes = measure in ("pack", "attention", "steps")
    found = [*kernel] if by_bytes else [*whole, *((p, "peer") for p in peers)]
    made = []
    for name, role in [*found, *(backends if measure == "attention" else [])]:
        middle = SLOW.get(name, MS.get(role if role == "ours" else name, 2.2))
        side = Side(name, role, lambda: 0.0, 4_000_000 if by_bytes else None)
        side.times = [middle, 1.1 * middle, middle]
        made.append(side)
    return made


def records(study: Study, folder: Path, broken: dict[str, Status]) -> None:
    """Records of all cases; `broken` are peers without a time."""
    for name, case in study.kernel_cases().items():
        parts = []
        for measure in case.measure:
            group = sides(measure, case.peers)
            for side in group:
                if side.name in broken:
                    side.status, side.times = broken[side.name], []
            parts.append(KernelPart(measure=measure, sides=to_records(group)))
        record = KernelRecord(
            study=study.study,
            spec_digest=kernels_digest(study, name),
            device="gpu",
            case=name,
            shape=case.shape,
            scheme=study.kernel_scheme(case),
            batch=case.batch,
            tokens=case.tokens,
            all_tokens=case.batch * case.tokens - 32 * case.ragged,
            parts=parts,
            seconds=1.0,
        )
        write_record(folder / "kernels/gpu" / f"{name}.json", record)


def drawn(study: Study, folder: Path, broken: dict[str, Status] | None = None) -> Any:
    """The figure of such records."""
    records(study, folder, broken or {})
    problems = Problems()
    rows = kernel_rows(Sources(study, folder, "gpu"), problems)
    write_table(pd.DataFrame(rows), folder / "kernels.parquet")
    assert problems == []
    return draw_figure("kernels", study, folder)


@pytest.fixture
def study(root: Path) -> Study:
    return load_study(root / "config/config.yaml").model_copy(update={"published": None})


def labels(axis: Any) -> list[str]:
    return [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]


def points(axis: Any, row: str, rows: list[str] | None = None) -> list[float]:
    """Where the markers of a row stand, of a panel with these names of rows or its own."""
    place = (rows or labels(axis)).index(row)
    found = [(c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in axis.containers]
    return [x for x, y in found if abs(y - place) < 0.5]


def test_rows_and_values(study: Study, tmp_path: Path) -> None:
    figure = drawn(study, tmp_path)
    above, middle, below = figure.axes
    names = labels_of(study)
    attention = f"decode attention, 7B MHA 16 {TIMES} 16K"
    assert sorted(points(above, attention)) == pytest.approx([100 / 6, 20, 25, 50])
    assert points(above, f"decode step, model, 7B MHA 4 {TIMES} 16K") == pytest.approx([50])
    rows = labels(above)  # of both panels
    assert above.get_ylim() == middle.get_ylim()
    assert sorted(points(middle, attention, rows)) == pytest.approx([2.0, 2.5, 3.0])
    assert points(middle, f"prefill, 7B MHA 4 {TIMES} 16K, ragged", rows) == pytest.approx([1.5])
    peers = [peer for case in study.kernel_cases().values() for peer in case.peers]
    assert labels(below) == [names.scheme(peer) for peer in peers]
    assert points(below, "HQQ 4 bits") == pytest.approx([5.0, 5.0])  # prefill, step of a layer
    # cases that only add peers to a case of the same shape share its row
    cases = [
        (study.kernel_scheme(c), c.shape, c.batch, c.tokens, m)
        for c in study.kernel_cases().values()
        for m in c.measure
    ]
    assert len(rows) == len(set(rows)) == len(set(cases))
    # kernels of another scheme have rows of their own, which name it
    by_allocated = [row for row in labels(above) if row.endswith("Allocated codes 3.4 bits")]
    assert f"{attention}, Allocated codes 3.4 bits" in by_allocated
    assert attention in labels(above)


def test_the_legend_names_backends_and_the_growing_cache(study: Study, tmp_path: Path) -> None:
    figure = drawn(study, tmp_path)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    ours = {"NUQ 3 bits, 1 % outliers", "Allocated codes 3.4 bits"}
    assert set(names[:2]) == ours
    assert names[2:] == [
        "fp16 attention, cuDNN",
        "fp16 attention, flash",
        "fp16 attention, memory-efficient",
        "16-bit cache, growing",
    ]


def test_missing_peers_are_named(study: Study, tmp_path: Path) -> None:
    broken: dict[str, Status] = {"hf-hqq-4": "not installed", "kvquant-ref3-1pct": "oom"}
    below = drawn(study, tmp_path, broken).axes[2]
    said = [text.get_text() for text in below.texts if text.get_text()]
    assert said == ["not installed", "out of memory"]
    assert points(below, "HQQ 4 bits") == []


def test_panels_without_data_are_left_out(study: Study, tmp_path: Path) -> None:
    raw = study.model_dump(mode="json")
    raw["kernels"]["cases"] = {"one": {"shape": "tiny", "tokens": 64, "measure": ["pack"]}}
    one = Study.model_validate(raw)
    figure = drawn(one, tmp_path / "one")
    assert [labels(axis) for axis in figure.axes] == [[f"quantize and pack, TINY 1 {TIMES} 64"]]
    with pytest.raises(UserError, match="no kernel and no comparison"):
        drawn(one, tmp_path / "none", {"nuq3-1pct": "oom"})
    raw["kernels"] = None
    with pytest.raises(UserError, match="no section 'kernels'"):
        draw_figure("kernels", Study.model_validate(raw), tmp_path)


def test_all_text_lies_inside_the_page(study: Study, tmp_path: Path) -> None:
    figure = drawn(study, tmp_path)
    figure.canvas.draw()
    page = figure.bbox
    for axis in figure.axes:
        for text in (axis.xaxis.label, *axis.get_yticklabels()):
            box = text.get_window_extent()
            assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1, text.get_text()
    heights = [axis.get_position().height for axis in figure.axes]
    assert np.all(np.array(heights) > 0.05)


def test_a_record_of_another_configuration_is_refused(study: Study, tmp_path: Path) -> None:
    records(study, tmp_path, {})
    raw = study.model_dump(mode="json")
    raw["kernels"]["cases"]["7b-mha-16x16384"]["batch"] = 8
    problems = Problems()
    kernel_rows(Sources(Study.model_validate(raw), tmp_path, "gpu"), problems)
    (tmp_path / "kernels/gpu/8b-gqa-1x16384.json").unlink()
    kernel_rows(Sources(study, tmp_path, "gpu"), problems)
    assert len(problems) == 2
    unfinished = Problems(present=True)
    kernel_rows(Sources(study, tmp_path, "gpu"), unfinished)
    assert not unfinished and unfinished.missing == 1
    assert "7b-mha-16x16384.json: measured with another configuration" in problems[0]
    assert "missing result" in problems[1]
