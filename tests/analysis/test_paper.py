"""The paper of several models and repetitions: it compiles, and every table tells rows apart.

Also covers: analysis.claim_list, analysis.claims, analysis.cost_tables, analysis.latex.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

from kvquant.analysis import claims, cost_tables, figure_list, latex, manuscript, plot
from kvquant.analysis.figures.style import plt
from kvquant.analysis.labels import TIMES, labels_of
from kvquant.analysis.plot import draw_figure
from kvquant.analysis.study_tables import load_tables
from kvquant.analysis.table_list import TABLES
from kvquant.analysis.tables import write_table
from kvquant.study.config import Study, load_study, parse_study
from tests.support.tables import two_models, write_tables


def build(study: Study, folder: Path) -> Path:
    """All that the rules of the paper make, from plausible tables."""
    tables, paper = folder / "tables", folder / "paper"
    write_tables(study, tables)
    file = folder / "study.json"
    file.write_text(study.model_dump_json(), encoding="utf-8")
    common = {"study": str(file), "tables": tables}
    claims.run(
        argparse.Namespace(**common, out=tables / "claims.csv", tex=paper / "tables/claims.tex")
    )
    latex.run(
        argparse.Namespace(
            **common, out_dir=paper / "tables", numbers=paper / "numbers.tex", present=False
        )
    )
    for name in figure_list.shown(study):
        out = [paper / f"figures/{name}.pdf"]
        plot.run(argparse.Namespace(**common, figure=name, out=out))
    return paper


def compiled(root: Path, paper: Path) -> str:
    """The text of the compiled document; the verb fails on an error and on an overfull line."""
    for tool in ("latexmk", "pdflatex", "pdftotext"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    pdf = paper / "study.pdf"
    manuscript.run(argparse.Namespace(tex=root / "paper/study.tex", paper=paper, out=pdf))
    command = ["pdftotext", "-layout", str(pdf), "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    return parse_study(two_models(root))


@pytest.fixture(scope="module")
def paper(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(study, tmp_path_factory.mktemp("paper"))


def cells(file: Path) -> list[list[str]]:
    """Cells of every line of a table, its head first."""
    lines = [x for x in file.read_text(encoding="utf-8").splitlines() if x.endswith(r"\\")]
    return [[c.strip() for c in line.removesuffix(r"\\").split(" & ")] for line in lines]


@pytest.mark.fault(
    "statistics",
    "titles and names with characters of LaTeX and unicode",
    "the paper compiles",
)
def test_it_compiles_and_shows_every_model(root: Path, study: Study, paper: Path) -> None:
    text = compiled(root, paper)
    names = labels_of(study)
    for name in names.models.values():
        assert name in text
    for name in names.timed.values():
        assert name.replace(TIMES, "\N{MULTIPLICATION SIGN}") in text
    keys = {*study.models, *study.tasks, *study.schemes} - {"fp16"}  # which is a word
    assert not [key for key in keys if key in text]
    for words in ("50 % of #1 & $2 {x} a", "(U+4E2D)", "Energy of whole jobs", "All comparisons"):
        assert words in text


@pytest.mark.parametrize(
    "name", sorted(set(TABLES) - {"jobs", "job-energy", "capacity", "prompts"})
)
def test_rows_are_told_apart(study: Study, paper: Path, name: str) -> None:
    """In every table the model is a column, and no two rows have the same labels."""
    head, *rows = cells(paper / f"tables/{name}.tex")
    assert head[0] == "model"
    assert {row[0] for row in rows} == set(labels_of(study).models.values())
    labels = [i for i, h in enumerate(head) if h in ("model", "task", "workload", "scheme", "rep")]
    keys = [tuple(row[i] for i in labels) for row in rows]
    assert len(keys) == len(set(keys)), name


def test_every_repetition_has_its_row(study: Study, paper: Path) -> None:
    for name, measured in (
        ("throughput", study.throughput_cells()),
        ("energy", study.energy_cells()),
    ):
        head, *rows = cells(paper / f"tables/{name}.tex")
        assert "rep" in head and len(rows) == len(study.models) * len(measured)
        assert {row[head.index("rep")] for row in rows} == {"1", "2"}


def test_claims_are_judged_per_model(study: Study, paper: Path) -> None:
    table = pd.read_csv(paper.parent / "tables/claims.csv")
    table = table[table.study.isna()]  # the others are those of companions
    for _, rows in table.groupby("claim", sort=False):
        assert set(rows.model) in ({*labels_of(study).models.values()}, {"any"}), rows
    assert table.groupby(["claim", "model"]).size().max() == 1


def axes_of(figure: matplotlib.figure.Figure) -> dict[str, int]:
    """Marks of every panel that has a title."""
    return {a.get_title() or a.get_title("left"): len(a.containers) for a in figure.axes}


def test_throughput_draws_every_model_and_repetition(study: Study, paper: Path) -> None:
    """A mark spans all repetitions: the medians of one rep alone give another picture."""
    perf = pd.read_parquet(paper.parent / "tables/perf.parquet")
    figure = draw_figure("throughput", study, paper.parent / "tables")
    assert len(figure.axes) == 2 * len(study.models)
    for axes, model in zip(zip(*[iter(figure.axes)] * 2, strict=True), study.models, strict=True):
        assert axes[0].get_title("left") == labels_of(study).model(model)
        mine = perf[perf.model == model]
        drawn = sorted(float(bars.lines[0].get_xdata()[0]) for bars in axes[0].containers)
        expected = mine.groupby(["scheme", "workload"]).prefill_ratio.median().dropna()
        assert drawn == pytest.approx(sorted(expected))
    plt.close(figure)


def test_pareto_tells_models_and_workloads_apart(study: Study, paper: Path) -> None:
    figure = draw_figure("pareto", study, paper.parent / "tables")
    rows = 2 + len(study.throughput.workloads) + len(study.energy.workloads)
    names = labels_of(study)
    assert len(figure.axes) == rows * len(study.models)
    titles = [axis.get_title() for axis in figure.axes[: len(study.models)]]
    assert titles == list(names.models.values())
    named = [axis.get_xlabel() for axis in figure.axes]
    for workload in (*names.timed.values(), *names.metered.values()):
        assert sum(workload in label.split("\n") for label in named) >= len(study.models)
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert "NUQ 3 bits, 1 % outliers" in legend and not legend & set(study.schemes)
    for axis in figure.axes:
        for bars in axis.containers:
            assert bars.has_yerr and bars.has_xerr
    plt.close(figure)


@pytest.mark.fault(
    "statistics",
    "estimated energy",
    "a panel that says so, no ratio",
)
def test_estimated_energy_is_not_in_the_pareto(study: Study, paper: Path, tmp_path: Path) -> None:
    shutil.copytree(paper.parent / "tables", tmp_path, dirs_exist_ok=True)
    energy = pd.read_parquet(tmp_path / "energy.parquet").assign(source="estimated")
    write_table(energy, tmp_path / "energy.parquet")
    figure = draw_figure("pareto", study, tmp_path)
    energies = [axis for axis in figure.axes if "J per token" in axis.get_xlabel()]
    assert len(energies) == len(study.models)
    for axis in energies:
        assert [text.get_text() for text in axis.texts] == ["estimated without counters"]
    plt.close(figure)
    tables = load_tables(study, tmp_path)
    assert all(r[-3] == "-" for r in _rows(cost_tables.energy(tables))[1:])


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    return [[c.strip() for c in line.removesuffix(r"\\").split(" & ")] for line in lines]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_many_schemes_and_long_names(root: Path, tmp_path: Path) -> None:
    """Many schemes with names of the greatest length stay on the page."""
    raw = two_models(root, ruler="")
    long = "a-scheme-with-a-name-that-is-quite-long-"
    for n in range(5):
        raw["schemes"][f"{long}{n}"] = {"kind": "kivi", "bits": 2, "group": 8 * (n + 1)}
        raw["evaluation"]["schemes"].append(f"{long}{n}")
    names = dict(
        zip(("a-model-" * 4 + "one", "b-model-" * 4 + "two"), raw["models"].values(), strict=True)
    )
    raw["tasks"] = {n: t for n, t in raw["tasks"].items() if t["suite"] in ("ruler", "perplexity")}
    study = parse_study({**raw, "models": names})
    compiled(root, build(study, tmp_path))


def test_the_demo_has_no_figure_of_nothing(root: Path) -> None:
    study = load_study(root / "config/demo.yaml")
    assert figure_list.shown(study) == [
        "pareto", "quality", "perplexity", "throughput", "append", "ablation",
    ]  # fmt: skip
