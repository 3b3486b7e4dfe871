"""Figures of little, of nothing and of the unusual: drawn without a warning, in finite limits.

Also covers: analysis.figure_list, analysis.figures.append, analysis.figures.perplexity.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from kvquant.analysis import plot
from kvquant.analysis.collect import collect
from kvquant.analysis.figure_list import FIGURES
from kvquant.analysis.figures import style
from kvquant.analysis.figures.append import append_panels
from kvquant.analysis.figures.style import plt
from kvquant.analysis.plot import draw_figure, draw_with_records, save_figure
from kvquant.analysis.problems import Problems
from kvquant.analysis.provenance import records_of, told
from kvquant.analysis.statistics import test_all as compare_all
from kvquant.analysis.tables import read_table, write_table
from kvquant.study.config import Study, load_study, parse_study
from tests.support import studies
from tests.support.tables import job_table, two_models, write_tables


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    """One model, two schemes, one perplexity task and two passkey tasks."""
    raw = two_models(root)
    raw["models"] = dict([next(iter(raw["models"].items()))])
    tasks = ("ppl-wikitext2-b", "passkey-2k", "passkey-4k")
    raw["tasks"] = {n: raw["tasks"][n] for n in tasks}
    raw["evaluation"] = {"schemes": ["fp16", "nuq3-1pct", "kivi-4"]}
    return parse_study(raw)


@pytest.fixture(scope="module")
def tables(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_tables(study, folder)
    return folder


def drawn(name: str, study: Study, folder: Path) -> Any:
    """A figure, drawn with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_figure(name, study, folder)
        figure.canvas.draw()
    for axis in figure.axes:
        assert np.isfinite([*axis.get_xlim(), *axis.get_ylim()]).all()
    return figure


def changed(tables: Path, folder: Path, name: str, **columns: Any) -> Path:
    """The tables with columns of one replaced."""
    for file in tables.glob("*.parquet"):
        table = pd.read_parquet(file)
        write_table(table.assign(**columns) if file.stem == name else table, folder / file.name)
    return folder


NAN = float("nan")
DIFFERENCES = {
    "no interval": {"ci_low": NAN, "ci_high": NAN},
    "nothing lost": {"difference": 0.0, "ci_low": 0.0, "ci_high": 0.0},
    "better": {"difference": -0.3, "ci_low": -0.5, "ci_high": -0.1},
    "huge": {"difference": 1e6, "ci_low": 1e5, "ci_high": 1e7},
    "wide": {"difference": 0.3, "ci_low": -1e3, "ci_high": 1e3},
}


@pytest.mark.parametrize("name", ["pareto", "perplexity"])
@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", DIFFERENCES)
def test_differences_of_every_size(
    study: Study, tables: Path, tmp_path: Path, case: str, name: str
) -> None:
    figure = drawn(name, study, changed(tables, tmp_path, "tests", **DIFFERENCES[case]))
    axis = figure.axes[0]
    labels = axis.get_yticklabels() if name == "pareto" else figure.axes[-1].get_xticklabels()
    assert 2 <= len({label.get_text() for label in labels}) == len(labels) <= 15
    plt.close(figure)


def test_a_workload_that_nobody_could_run(study: Study, tables: Path, tmp_path: Path) -> None:
    speeds = [f"scheme_{part}_tokens_per_s" for part in ("prefill", "decode")]
    empty = dict.fromkeys(("prefill_ratio", "decode_ratio", "quantize_share", *speeds), NAN)
    folder = changed(tables, tmp_path, "perf", **empty, scheme_status="oom")
    figure = drawn("throughput", study, folder)
    words = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert words and set(words) == {"out of memory"}
    plt.close(figure)
    figure = drawn("pareto", study, folder)
    (speed,) = (axis for axis in figure.axes if "tokens/s" in axis.get_xlabel())
    assert [text.get_text() for text in speed.texts] == ["out of memory"]
    plt.close(figure)


def test_costs_without_points_say_why(study: Study, tables: Path, tmp_path: Path) -> None:
    """What a study measures and has no record of is not told like what it leaves out."""
    for table in ("perf", "energy"):
        empty = pd.read_parquet(tables / f"{table}.parquet").iloc[:0]
        for file in tables.glob("*.parquet"):
            write_table(pd.read_parquet(file), tmp_path / file.name)
        write_table(empty, tmp_path / f"{table}.parquet")
        raw = study.model_dump(mode="json")
        raw["throughput" if table == "perf" else "energy"]["workloads"] = {}
        for asked, said in (
            (study, "not measured yet"),
            (parse_study(raw), "not part of this study"),
        ):
            figure = drawn("pareto", asked, tmp_path)
            assert said in [text.get_text() for axis in figure.axes for text in axis.texts]
            plt.close(figure)


def test_panels_of_one_task_name_it_once(study: Study, tables: Path) -> None:
    figure = drawn("pareto", study, tables)
    assert "Wikitext-2" in figure.get_supylabel()
    assert not [a.get_xlabel() for a in figure.axes if "Wikitext-2" in a.get_xlabel()]
    plt.close(figure)


def test_titles_of_perplexity_lie_inside_the_figure(root: Path, tmp_path: Path) -> None:
    raw = two_models(root)
    raw["tasks"] = {"ppl-wikitext2-b": raw["tasks"]["ppl-wikitext2-b"]}
    raw["tasks"]["ppl-wikitext2-b"]["label"] = "Wikitext-2, protocol B, windows of 8,192 tokens"
    study = parse_study(raw)
    write_tables(study, tmp_path)
    figure = drawn("perplexity", study, tmp_path)
    renderer = figure.canvas.get_renderer()
    for axis in figure.axes:
        box = axis.title.get_window_extent(renderer)
        assert box.x0 > -1 and box.x1 < figure.bbox.width + 1, axis.get_title()
    plt.close(figure)


def test_names_of_many_schemes_do_not_overlap(root: Path, tmp_path: Path) -> None:
    """Names of two lines would, where the figure is as high as a page."""
    raw = two_models(root)
    raw["models"] = dict([next(iter(raw["models"].items()))])
    raw["tasks"] = {"ppl-wikitext2-b": raw["tasks"]["ppl-wikitext2-b"]}
    for i in range(36):
        label = f"KIVI 4 bits, residual of {i + 10} groups"
        more = {"kind": "kivi", "bits": 4, "residual": 32 * (i + 10), "label": label}
        raw["schemes"][f"more-{i}"] = more
        raw["evaluation"]["schemes"].append(f"more-{i}")
    study = parse_study(raw)
    write_tables(study, tmp_path)
    figure = drawn("perplexity", study, tmp_path)
    renderer = figure.canvas.get_renderer()
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) > 36
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    plt.close(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_said_in_whole_words(name: str) -> None:
    """What a figure without a measurement says lies inside of it."""
    with plt.rc_context(style.STYLE):
        figure = plot._not_measured(name)
    (text,) = figure.axes[0].texts
    assert text.get_text().replace("\n", " ").endswith(FIGURES[name].label)
    box = text.get_window_extent(figure.canvas.get_renderer())
    page = figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    plt.close(figure)


def test_labels_stay_apart(root: Path, tmp_path: Path) -> None:
    """Of two models: titles and labels of neighbours do not overlap."""
    study = parse_study(two_models(root))
    write_tables(study, tmp_path)
    for name in ("pareto", "throughput", "passkey"):
        figure = drawn(name, study, tmp_path)
        assert figure.get_figheight() <= style.PAGE_HEIGHT
        renderer = figure.canvas.get_renderer()
        shown = [a for a in figure.axes if a.get_visible() and a.get_label() != "<colorbar>"]
        texts = [t for a in shown for t in (a.title, a._left_title, a.xaxis.label) if t.get_text()]
        boxes = [t.get_window_extent(renderer) for t in texts]
        for i, box in enumerate(boxes):
            assert box.x0 > -1 and box.x1 < figure.bbox.width + 1, (name, texts[i].get_text())
            for j in range(i):
                assert not box.overlaps(boxes[j]), (name, texts[i].get_text(), texts[j].get_text())
        plt.close(figure)


@pytest.mark.parametrize("name", ["pareto", "quality", "perplexity", "throughput", "passkey"])
def test_a_column_holds_every_figure(study: Study, tables: Path, name: str, tmp_path: Path) -> None:
    """No text is smaller than 7 points, and no figure is scaled down on the paper's page."""
    figure = drawn(name, study, tables)
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert texts and min(text.get_fontsize() for text in texts) >= style.SMALL
    width, height = figure.get_size_inches()
    assert width == (style.PAGE_WIDTH if name in ("pareto", "quality") else style.WIDTH)
    assert height <= style.PAGE_HEIGHT
    shown = "\n".join(text.get_text() for text in texts)
    assert not [key for key in (*study.schemes, *study.tasks, *study.models) if key in shown]
    plt.close(figure)


def test_a_scheme_looks_alike_in_all_figures(study: Study, tables: Path) -> None:
    """Marks of the same scheme have one color and marker, whichever figure draws them."""
    color, marker = style.looks(study)["kivi-4"]
    pareto = drawn("pareto", study, tables)
    (handle,) = (h for h in pareto.legends[0].legend_handles if h.get_label() == "KIVI 4 bits")
    assert (handle.get_color(), handle.get_marker()) == (color, marker)
    for name in ("perplexity", "throughput"):
        figure = drawn(name, study, tables)
        rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        place = rows.index("KIVI 4 bits")
        lines = [bars.lines[0] for bars in figure.axes[0].containers]
        mine = [line for line in lines if abs(line.get_ydata()[0] - place) < 0.5]
        assert {(line.get_color(), line.get_marker()) for line in mine} == {(color, marker)}
        plt.close(figure)
    plt.close(pareto)


@pytest.mark.parametrize("cost", [0.01, 0.0, NAN])
@pytest.mark.parametrize("sizes", [[1024], [1024, 131072]])
def test_append_of_few_sizes_and_no_time(sizes: list[int], cost: float) -> None:
    parts = ("token_ms_median", "token_ms_p10", "token_ms_p90")
    row = {"chunk": 1, "series": "s", **dict.fromkeys(parts, cost)}
    points = pd.DataFrame([{**row, "tokens": n} for n in sizes])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, axes = plt.subplots(1, 1, squeeze=False)
        append_panels(axes[:, 0], points, {"s": ("#000000", "o")}, {})
        figure.canvas.draw()
    low, high = axes[0, 0].get_ylim()
    assert 0 < low < high and np.isfinite(high)
    plt.close(figure)


def test_names_of_append_panels_do_not_touch() -> None:
    parts = ("token_ms_median", "token_ms_p10", "token_ms_p90")
    row = {"series": "s", **dict.fromkeys(parts, 0.01), "tokens": 1024}
    points = pd.DataFrame([{**row, "chunk": chunk} for chunk in (1, 64)])
    figure, axes = plt.subplots(2, 1, figsize=(style.WIDTH, 4.0), squeeze=False)
    append_panels(axes[:, 0], points, {"s": ("#000000", "o")}, {})
    figure.canvas.draw()
    first, second = (axis.yaxis.label.get_window_extent() for axis in axes[:, 0])
    assert not first.overlaps(second)
    plt.close(figure)


def test_a_figure_names_the_records_that_it_shows(root: Path, tmp_path: Path) -> None:
    study = parse_study(two_models(root))
    write_tables(study, tmp_path)
    figure, source = draw_with_records("perplexity", study, tmp_path)
    rows = read_table(tmp_path, "eval")
    assert source == f"from {told(records_of(rows))}"  # which the tests come from, too
    for suffix in (".pdf", ".svg"):
        save_figure(figure, tmp_path / f"a{suffix}", source)
        assert source.encode() in (tmp_path / f"a{suffix}").read_bytes()
    _, source = draw_with_records("throughput", study, tmp_path)
    perf = read_table(tmp_path, "perf")
    assert source == f"from {told(records_of(perf))}"
    plt.close("all")


def test_a_figure_of_records_without_its_measurement_says_so(tmp_path: Path) -> None:
    """A case of jobs may have been measured without a search for what fits."""
    study = load_study(Path(__file__).parents[2] / "config/two_gpus.yaml")
    jobs = job_table(study).assign(capacity_tokens=None, context_tokens=None, device=study.device)
    write_table(jobs, tmp_path / "jobs.parquet")
    figure = draw_figure("capacity", study, tmp_path)
    (text,) = figure.findobj(lambda artist: "Nothing is measured" in getattr(artist, "_text", ""))
    assert "what fits" in " ".join(text.get_text().split())
    plt.close(figure)


@pytest.mark.parametrize("alone", ["fp16", "nuq3"])
def test_figures_of_losses_without_a_comparison_say_so(tmp_path: Path, alone: str) -> None:
    """Of an unfinished study, of which the baseline or all but the baseline is evaluated."""
    study = studies.study_of()
    for task, seed in itertools.product(study.tasks, study.seeds):
        studies.write_evaluation(study, tmp_path / "r", "tiny", alone, task, seed)
    tables = collect(study, tmp_path / "r", studies.DEVICE, Problems(present=True))
    tables["tests"] = compare_all(study, tables["eval"], tables["samples"])
    for name, table in tables.items():
        write_table(table, tmp_path / f"{name}.parquet")
    for name in ("pareto", "quality", "perplexity"):
        figure = draw_figure(name, study, tmp_path)
        texts = figure.findobj(lambda artist: "Nothing is measured" in getattr(artist, "_text", ""))
        assert len(texts) == 1
        plt.close(figure)
