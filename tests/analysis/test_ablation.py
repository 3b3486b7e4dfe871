"""Ablations: which options a study varies, their tables and their figure.

Also covers: analysis.ablation_tables, analysis.figures.ablation.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from kvquant.analysis import figure_list, html_tables, latex, page_list, table_list
from kvquant.analysis.ablation import Ablation, ablations, drawable, task_of
from kvquant.analysis.ablation_tables import NOTHING, all_rows, rows_of
from kvquant.analysis.figures import ablation as figure_module
from kvquant.analysis.figures.style import PAGE_HEIGHT, PAGE_WIDTH, SMALL, WIDTH
from kvquant.analysis.latex import build_table
from kvquant.analysis.plot import draw_figure
from kvquant.analysis.study_tables import Tables
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from kvquant.study.config import Study, load_study, parse_study
from kvquant.study.overlay import read_study
from tests.support.studies import study_of
from tests.support.tables import accuracy_tables

NUQ: dict[str, Any] = {"kind": "nuq", "bits": 3}
SCHEMES: dict[str, Any] = {
    "fp16": {"kind": "fp16"},
    "block128": NUQ | {"block_size": 128},
    "nuq3": NUQ,
    "block32": NUQ | {"block_size": 32, "label": "small blocks"},
    "no-outliers": NUQ | {"outliers": 0.0},
    "two-changes": NUQ | {"outliers": 0.02, "sinks": 0},
    "other-kind": {"kind": "kivi", "bits": 4},
    "same-label-aside": NUQ | {"label": "The same"},
    "unweighted": NUQ | {"weighting": "none"},
    "fewer": NUQ | {"calibration": "half"},
    "elsewhere": NUQ | {"calibration": "elsewhere"},
    "same-calibration": NUQ | {"calibration": "same"},
}
CALIBRATIONS = {
    "half": {"windows": 8},
    "same": {},
    "elsewhere": {"windows": 4, "seed": 3},
}
CASE: dict[str, Any] = {"shape": "7b-mha", "tokens": 1024, "measure": ["pack", "attention"]}


def study(**changed: Any) -> Study:
    """A study that varies four options of its headline and the calibration."""
    names = (("one", "nuq3"), ("two", "block128"))
    cases = {name: CASE | {"scheme": scheme} for name, scheme in names}
    asked: dict[str, Any] = {"schemes": SCHEMES, "calibrations": CALIBRATIONS}
    return study_of(**asked | {"kernels": {"cases": cases}} | changed)


def named(asked: Study, option: str) -> Ablation:
    (found,) = (a for a in ablations(asked) if a.option == option)
    return found


def kernels(asked: Study, device: str = "h100-80gb-hbm3") -> pd.DataFrame:
    """The table of kernels of :func:`study`, two fp16 backends per case."""
    rows = []
    for at, (name, case) in enumerate(asked.kernel_cases().items()):
        same = {"device": device, "case": name, "shape": case.shape, "batch": case.batch}
        same |= {
            "scheme": asked.kernel_scheme(case),
            "tokens": case.tokens,
            "all_tokens": case.tokens,
        }
        same |= {"status": "ok"}
        sides = (
            ("pack", "copy", "copy", 1.0, np.nan),
            ("pack", asked.kernel_scheme(case), "ours", 0.7 + 0.1 * at, np.nan),
            ("attention", asked.kernel_scheme(case), "ours", 0.6, np.nan),
            ("attention", "cudnn", "fp16", np.nan, 2.5 + at),
            ("attention", "flash", "fp16", np.nan, 2.0 + at),
        )
        for measure, side, role, share, ratio in sides:
            own = {"measure": measure, "side": side, "role": role}
            rows.append(same | own | {"copy_share": share, "over_ours_median": ratio})
    return pd.DataFrame(rows)


def tables_of(asked: Study, timed: pd.DataFrame | None = None) -> Tables:
    none = pd.DataFrame()
    return Tables(
        asked, accuracy_tables(asked)[0], none, none, none, none, none, none,
        none if timed is None else timed,
    )  # fmt: skip


def test_schemes_that_differ_in_one_option_are_found() -> None:
    found = {a.option: [(c.scheme, c.words) for c in a.choices] for a in ablations(study())}
    assert found == {
        "block_size": [("block32", "32"), ("nuq3", "64"), ("block128", "128")],
        "outliers": [("no-outliers", "0 %"), ("nuq3", "1 %")],
        "weighting": [("nuq3", "Fisher, range squared"), ("unweighted", "equal")],
        "calibration-windows": [("fewer", "16K"), ("nuq3", "32K")],
        "calibration": [("nuq3", "the study's"), ("elsewhere", "elsewhere")],
    }
    assert named(study(), "block_size").name == "block-size"
    assert named(study(), "block_size").label == "tokens per block"
    assert named(study(), "block_size").ordered and not named(study(), "weighting").ordered


def test_the_headline_decides_what_is_varied() -> None:
    """From the view of another scheme, the former headline is the variant."""
    asked = study(headline="fewer")
    found = {a.option: [c.scheme for c in a.choices] for a in ablations(asked)}
    assert found == {
        "calibration-windows": ["fewer", "nuq3"],
        "calibration": ["fewer", "elsewhere"],
    }


def test_seeds_have_no_order() -> None:
    asked = study(
        schemes={n: SCHEMES[n] for n in ("fp16", "nuq3", "fewer")},
        calibrations={"half": {"seed": 5}},
        kernels=None,
    )
    (found,) = ablations(asked)
    assert found.option == "calibration-seed" and not found.ordered


@pytest.mark.parametrize(
    "more", [None, "two-changes", "same-label-aside", "other-kind", "same-calibration"]
)
def test_a_study_that_varies_nothing_has_no_such_products(more: str | None) -> None:
    schemes = {n: SCHEMES[n] for n in ("fp16", "nuq3", more) if n is not None}
    same: dict[str, Any] = {"same": {}} if more == "same-calibration" else {}
    asked = study(schemes=schemes, calibrations=same, kernels=None)
    assert ablations(asked) == []
    assert "ablation" not in figure_list.shown(asked) + page_list.shown(asked)
    assert table_list.of_study(asked) == table_list.TABLES
    assert all_rows(tables_of(asked)).empty
    for check in (figure_list.check, page_list.check):
        with pytest.raises(UserError, match="differs from the headline in one option alone"):
            check(asked, "ablation")


def test_a_figure_needs_losses_of_two_values() -> None:
    tasks = {"passkey": {"suite": "passkey", "length": 200, "samples": 4}}
    without = study(tasks=tasks)
    assert ablations(without) and task_of(without) is None and drawable(without) == []
    chosen = study(evaluation={"schemes": ["fp16", "nuq3", "unweighted"]})
    assert [a.option for a in drawable(chosen)] == ["weighting"]


def test_rows_hold_quality_and_kernels() -> None:
    asked = study()
    t = tables_of(asked, kernels(asked))
    rows = rows_of(t, named(asked, "block_size"))
    assert list(rows.scheme) == ["block32", "nuq3", "block128"]
    assert list(rows.headline) == [False, True, False]
    evaluations = t.evaluations[t.evaluations.task == "ppl"]
    mean = evaluations.groupby("scheme")["value"].mean()
    for row in rows.itertuples():
        assert row.value == pytest.approx(mean[row.scheme])
        assert row.change == pytest.approx(mean[row.scheme] - mean["fp16"]) and row.change > 0
        assert row.bits == pytest.approx(3.6) and row.metric == "perplexity"
    assert rows.pack_share.to_list() == pytest.approx([np.nan, 0.7, 0.8], nan_ok=True)
    # against the fastest of fp16's backends
    assert rows.attention_ratio.to_list() == pytest.approx([np.nan, 2.0, 3.0], nan_ok=True)
    assert list(rows.timed_on) == ["", "H100 80GB HBM3", "H100 80GB HBM3"]


def test_a_scheme_timed_at_two_sizes_has_two_rows() -> None:
    cases = {
        f"{scheme}-{n}": CASE | {"scheme": scheme, "tokens": n}
        for n in (1024, 4096)
        for scheme in ("nuq3", "no-outliers")
    }
    asked = study(kernels={"cases": cases})
    timed = kernels(asked)
    rows = rows_of(tables_of(asked, timed), named(asked, "outliers"))
    assert list(rows.scheme) == 2 * ["no-outliers"] + 2 * ["nuq3"]
    assert rows["size"].nunique() == 2
    assert list(rows.pack_share) == pytest.approx([0.8, 1.0, 0.7, 0.9])


def test_kernels_of_one_value_compare_nothing() -> None:
    """Neither the headline's own cases, nor two values at different sizes."""
    cases = {
        "headline": CASE,
        "elsewhere": CASE | {"scheme": "no-outliers", "tokens": 4096},
        "same": CASE | {"scheme": "block32"},
    }
    asked = study(kernels={"cases": cases})
    timed = kernels(asked)
    for option, compared in (("outliers", False), ("block_size", True)):
        rows = rows_of(tables_of(asked, timed), named(asked, option))
        assert len(rows) == len(named(asked, option).choices)
        assert bool((rows["size"] != "").any()) is compared
        caption = table_list.of_study(asked)[f"ablation-{named(asked, option).name}"].caption
        assert ("Kernels run" in caption) is compared


def test_two_devices_are_not_mixed() -> None:
    asked = study(device="h200")
    both = pd.concat([kernels(asked), kernels(asked, "h200").assign(copy_share=0.5)])
    rows = rows_of(tables_of(asked, both), named(asked, "block_size"))
    timed = rows[rows["size"] != ""]
    assert set(timed.timed_on) == {"H200"} and set(timed.pack_share) == {0.5}


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    return [[cell.strip() for cell in line.removesuffix(r"\\").split(" & ")] for line in lines]


def test_latex_tables_mark_the_headline() -> None:
    asked = study()
    head, *rows = cells(build_table("ablation-block-size", tables_of(asked, kernels(asked))))
    assert head[:2] == ["scheme", "tokens per block"] and "perplexity" in head
    assert [row[1] for row in rows] == ["32", r"\textbf{64}", "128"]
    assert [row[head.index("pack, of a copy")] for row in rows] == ["-", r"70 \%", r"80 \%"]
    assert rows[0][0] == "small blocks"
    head, *rows = cells(build_table("ablation-outliers", tables_of(asked)))
    assert "pack, of a copy" not in head
    assert [row[1] for row in rows] == [r"0 \%", r"\textbf{1 \%}"]


def test_every_option_has_a_table_in_the_paper(tmp_path: Path) -> None:
    asked = study(kernels=None)
    names = [f"ablation-{a.name}" for a in ablations(asked)]
    assert list(table_list.of_study(asked))[-len(names) :] == names
    floats = latex.floats(tables_of(asked))
    for name in names:
        assert floats.count(f"{{{name}}}") == 1
    assert floats.index(names[-1]) < floats.index(r"\drawn{ablation}")
    write_table(accuracy_tables(asked)[0], tmp_path / "eval.parquet")
    write_table(pd.DataFrame(columns=["level"]), tmp_path / "tests.parquet")
    file = tmp_path / "study.json"
    file.write_text(asked.model_dump_json(), encoding="utf-8")
    args = argparse.Namespace(study=str(file), tables=tmp_path, out_dir=tmp_path / "tex")
    args.numbers, args.present = None, True
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # other tables need tests, which are not the subject
        chosen = {n: t for n, t in table_list.of_study(asked).items() if n in names}
        patch.setattr(table_list, "of_study", lambda study: chosen)
        latex.run(args)
    assert {f.stem for f in (tmp_path / "tex").iterdir()} == set(names)


def test_what_is_not_measured_is_not_compared(tmp_path: Path) -> None:
    asked = study()
    t = tables_of(asked)
    few = t.evaluations[t.evaluations.scheme.isin(["fp16", "nuq3", "unweighted"])]
    few_tables = Tables(asked, few, *[pd.DataFrame()] * 6)
    assert NOTHING in build_table("ablation-outliers", few_tables)
    assert len(cells(build_table("ablation-weighting", few_tables))) == 3
    write_table(few, tmp_path / "eval.parquet")
    titles = [axis.get_title() for axis in draw_figure("ablation", asked, tmp_path).axes]
    assert titles == ["weights of the codebooks"]
    write_table(few[few.scheme != "unweighted"], tmp_path / "eval.parquet")
    (axis,) = draw_figure("ablation", asked, tmp_path).axes
    (text,) = axis.texts
    assert text.get_text() == "of no option a second value is measured yet"


def test_the_page_shows_all_options(tmp_path: Path) -> None:
    asked = study(append=None)
    evaluations, _ = accuracy_tables(asked)
    empty = pd.DataFrame(columns=["device"])
    for name in ("perf", "energy", "tests", "pareto"):
        write_table(empty, tmp_path / f"{name}.parquet")
    write_table(evaluations, tmp_path / "eval.parquet")
    write_table(kernels(asked), tmp_path / "kernels.parquet")
    table = html_tables.table_of(asked, tmp_path, "ablation")
    assert list(dict.fromkeys(table["option"])) == [a.label for a in ablations(asked)]
    assert set(table["metric"]) == {"perplexity"} and "likelihood" not in table
    assert "small blocks" in set(table["scheme"]) and table["the headline's"].sum() == 5


@pytest.fixture(scope="module")
def many(root: Path) -> Study:
    """The study of NUQ's options."""
    return load_study(root / "config/ablation.yaml")


def drawn(asked: Study, folder: Path) -> Any:
    write_table(accuracy_tables(asked)[0], folder / "eval.parquet")
    figure = draw_figure("ablation", asked, folder)
    figure.canvas.draw()
    return figure


def test_the_study_of_options_has_a_panel_each(many: Study, tmp_path: Path) -> None:
    options = [a.option for a in ablations(many)]
    for asked in ("block_size", "outliers", "bits", "sinks", "calibration-windows", "weighting"):
        assert asked in options
    figure = drawn(many, tmp_path)
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert len(axes) == len(options)
    size = next(a for a in axes if a.get_title() == "tokens per block")
    words = [label.get_text().split("\n") for label in size.get_xticklabels()]
    assert words == [[n, "3.60"] for n in ("32", "64", "128", "256", "512", "1,024")]
    bold = [label.get_text() for label in size.get_xticklabels() if label.get_weight() == "bold"]
    assert bold == ["64\n3.60"]
    share = next(a for a in axes if "outliers" in a.get_title())
    assert share.get_title() == "exact outliers, %"
    assert [t.get_text().split("\n")[0] for t in share.get_xticklabels()][1] == "0.25"


def test_texts_are_large_enough_and_apart(many: Study, tmp_path: Path) -> None:
    figure = drawn(many, tmp_path)
    width, height = figure.get_size_inches()
    assert width == PAGE_WIDTH and height <= PAGE_HEIGHT
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= SMALL
    renderer = figure.canvas.get_renderer()
    for axis in (axis for axis in figure.axes if axis.get_visible()):
        boxes = [label.get_window_extent(renderer) for label in axis.get_xticklabels()]
        for left, right in pairwise(boxes):
            assert left.x1 < right.x0, axis.get_title()
        title = axis.title.get_window_extent(renderer)
        assert title.x0 > -1 and title.x1 < figure.bbox.width + 1


def test_points_are_means_over_seeds_with_their_span(tmp_path: Path) -> None:
    asked = study(evaluation={"schemes": ["fp16", "nuq3", "no-outliers"]})
    figure = drawn(asked, tmp_path)
    assert figure.get_size_inches()[0] == WIDTH  # of one panel
    (axis,) = figure.axes
    values = accuracy_tables(asked)[0]
    values = values[values.task == "ppl"]
    for bars, scheme in zip(axis.containers, ("no-outliers", "nuq3"), strict=True):
        losses = figure_module.losses(values, "fp16", scheme)
        assert len(losses) == 2 and bars.lines[0].get_ydata()[0] == pytest.approx(losses.mean())
        (segment,) = bars.lines[2][0].get_segments()
        assert sorted(segment[:, 1]) == pytest.approx(sorted(losses))
        hollow = bars.lines[0].get_markerfacecolor() == "white"
        assert hollow is (scheme != "nuq3")
    assert axis.get_ylim()[0] == 0


def test_several_models_have_a_marker_each(root: Path, tmp_path: Path) -> None:
    raw = read_study(root / "config/ablation.yaml")
    raw["models"]["other"] = {"source": "local", "path": "other"}
    figure = drawn(parse_study(raw), tmp_path)
    assert [h.get_label() for h in figure.legends[0].legend_handles] == [
        "SmolLM2-135M-Instruct",
        "other",
    ]
    words = figure.axes[0].get_xticklabels()[0].get_text().split("\n")
    assert len(words) == 1 + 2  # a line of bits per model
