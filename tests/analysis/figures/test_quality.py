"""The figure of loss against bits: which scheme stands on which curve.

Also covers: analysis.figures.kept_tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvquant.analysis.figures import quality
from kvquant.analysis.figures.kept_tokens import kept_tokens, without_variants
from kvquant.analysis.figures.style import MARKERS, looks, method_looks, plt, size_scale
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from kvquant.study.config import Study
from tests.support.studies import study_of
from tests.support.tables import write_tables

SCHEMES: dict[str, dict[str, Any]] = {
    "fp16": {"kind": "fp16"},
    "nuq4": {"kind": "nuq", "bits": 4},
    "nuq3": {"kind": "nuq", "bits": 3},
    "nuq3-sink0": {"kind": "nuq", "bits": 3, "sinks": 0},
    "kivi-4": {"kind": "kivi", "bits": 4},
    "kivi-2": {"kind": "kivi", "bits": 2},
    "kivi-4-sink1": {"kind": "kivi", "bits": 4, "sinks": 1},
    "kivi-4-same": {"kind": "kivi", "bits": 4, "sinks": 1, "residual": 0},
    "kvarn-4": {"kind": "kvarn", "bits": 4},
}


@pytest.fixture
def study() -> Study:
    return study_of(schemes=SCHEMES)


def test_16_bit_tokens_tell_schemes_of_a_method_apart(study: Study) -> None:
    head = study.schemes[study.headline]
    kept = {k: kept_tokens(s, head) for k, s in study.schemes.items() if s.quantizes}
    assert kept == {
        **{"nuq4": "same", "nuq3": "same", "nuq3-sink0": "other", "kivi-4": "other"},
        **{"kivi-2": "other", "kivi-4-sink1": None, "kivi-4-same": "same", "kvarn-4": "other"},
    }


def test_variants_are_left_out_where_a_method_has_our_tokens(study: Study) -> None:
    shown = without_variants(study, [*study.schemes])
    assert shown == ["fp16", "nuq4", "nuq3", "kivi-4-same", "kvarn-4"]
    assert without_variants(study, ["kivi-4", "kivi-2"]) == ["kivi-4", "kivi-2"]


def test_a_curve_joins_the_schemes_of_a_method_by_their_bits(study: Study, tmp_path: Path) -> None:
    write_tables(study, tmp_path)
    figure = quality.draw(study, tmp_path)
    (axis,) = figure.axes
    marked = method_looks(study)
    bits = {line.get_marker() + line.get_linestyle(): list(line.get_xdata()) for line in axis.lines
            if line.get_marker() in MARKERS and len(line.get_xdata())}  # fmt: skip
    nuq, kivi, kvarn = (marked[m][1] for m in ("NUQ", "KIVI", "KVarN"))
    assert bits == {
        nuq + "-": pytest.approx([3.6, 4.6]), nuq + "--": pytest.approx([3.6]),
        kivi + "-": pytest.approx([4.6]), kivi + "--": pytest.approx([2.6, 4.6]),
        kvarn + "--": pytest.approx([4.6]),
    }  # fmt: skip
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:3] == ["NUQ", "KIVI", "KVarN"] and names[3:] == [*quality.NAMES.values()]


def test_methods_have_the_colors_of_their_schemes_and_markers_of_their_own(study: Study) -> None:
    marked, schemes = method_looks(study), looks(study)
    for key, scheme in study.schemes.items():
        if scheme.quantizes:
            assert marked[scheme.method()][0] == schemes[key][0]
    assert len({marker for _, marker in marked.values()}) == len(marked)


def test_schemes_with_8_bit_attention_have_a_curve_of_their_own(study: Study) -> None:
    eight = study.schemes["nuq3"].model_copy(update={"prompt_attention": "8-bit"})
    schemes = {**study.schemes, "nuq3-attention8": eight}
    more = study.model_copy(update={"schemes": schemes})
    marked = method_looks(more)
    (color, marker), plain = marked["NUQ, 8-bit attention"], marked["NUQ"]
    assert color == plain[0] and marker != plain[1]
    rows = [{"scheme": key, "bits": 3.6, "y": 0.1} for key in ("nuq3", "nuq3-attention8")]
    drawn = quality.curves(more, pd.DataFrame(rows))
    assert [name for name, _ in drawn] == ["NUQ", "NUQ, 8-bit attention"]


def test_without_a_finite_loss_there_is_no_curve(study: Study, tmp_path: Path) -> None:
    only = study.model_copy(update={"schemes": {k: study.schemes[k] for k in ("fp16", "nuq3")}})
    write_tables(only, tmp_path)
    tests = pd.read_parquet(tmp_path / "tests.parquet")
    write_table(tests.assign(difference=float("nan")), tmp_path / "tests.parquet")
    with pytest.raises(UserError, match="no scheme has a finite difference"):
        quality.draw(only, tmp_path)


@pytest.mark.parametrize("ends", [(2.9, 8.8), (10.4, 12.6), (1.0, 16.0), (4.2, 22.0), (3e3, 9e5)])
def test_an_axis_of_sizes_names_some(ends: tuple[float, float]) -> None:
    _, axis = plt.subplots()
    axis.plot(ends, (0, 1))
    size_scale(axis)
    names = [label.get_text() for label in axis.get_xticklabels()]
    assert 3 <= len(names) == len(set(names)) <= 10
