"""The LaTeX tables of the suites, the summary and their macros, from plausible results.

Also covers: analysis.booktabs, analysis.study_tables, analysis.table_list.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvquant.analysis import latex, suite_tables
from kvquant.analysis.booktabs import Latex, booktabs, escape
from kvquant.analysis.figure_list import FIGURES
from kvquant.analysis.figures.style import plt
from kvquant.analysis.latex import build_table
from kvquant.analysis.numbers.number_list import all_numbers
from kvquant.analysis.pareto import pareto_table
from kvquant.analysis.plot import draw_figure
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.analysis.table_list import TABLES, of_study
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from kvquant.study.config import load_study
from tests.support.tables import write_tables

NUQ = r"NUQ {} bits, 1 \% outliers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tables are."""
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def tables(root: Path, folder: Path) -> Tables:
    """Those of the study of one H100, with the schemes that a test or an ablation names."""
    study = load_study(root / "config/config.yaml")
    # few draws and schemes: the subject is which rows and cells there are
    statistics = study.statistics.model_copy(update={"bootstrap": 100})
    used = {scheme for scheme, *_ in (*study.throughput_cells(), *study.energy_cells())}
    used |= {scheme for case in study.job_cases().values() for scheme in case.schemes}
    named = {"fp16", "nuq4-1pct", "nuq2-1pct", "nf3-1pct", "nuq3-1pct-sink0", "kivi-4", "kivi-2"}
    kept = {name: s for name, s in study.schemes.items() if name in used | named}
    study = study.model_copy(
        update={"append": None, "kernels": None, "statistics": statistics, "schemes": kept}
    )
    write_tables(study, folder)
    return load_tables(study, folder)


def rows(text: str) -> list[list[str]]:
    """Cells of every line of a LaTeX table, its head first."""
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    return [[cell.strip() for cell in line.removesuffix(r"\\").split(" & ")] for line in lines]


ABLATIONS = tuple(f"ablation-{name}" for name in ("bits", "datatype", "sinks"))


# own prompts are tested by tests/workflow/test_own_study.py
@pytest.mark.parametrize("name", sorted({*TABLES, *ABLATIONS} - {"prompts"}))
def test_every_row_has_every_column(tables: Tables, name: str) -> None:
    text = build_table(name, tables)
    cells = rows(text)
    assert len(cells) > 1 and len({len(row) for row in cells}) == 1
    assert text.startswith("% generated") and "nan" not in text
    (letters,) = re.findall(r"\\begin\{(?:tabular|longtable\*?)\}\{(.*)\}", text)
    assert len(re.findall("[lrpL]", letters)) == len(cells[0])


def test_ruler_has_13_tasks_and_their_mean(tables: Tables) -> None:
    cells = rows(suite_tables.scores(tables, "ruler"))
    assert len(cells[0]) == 1 + 13 + 1 and "mean" in cells[0][-1]
    assert [row[0] for row in cells[1:]] == [*map(escape, tables.labels.schemes.values())]
    values = [float(re.match(r"[\d.]+", cell)[0]) for cell in cells[3][1:]]  # type: ignore[index]
    assert values[-1] == pytest.approx(sum(values[:-1]) / 13, abs=0.06)
    # the unquantized cache is compared with nothing; two bits are worse
    assert not any("$" in cell for cell in cells[1])
    two = next(row for row in cells if row[0] == NUQ.format(2))
    assert two[-1].endswith(r"{$\downarrow$}")


def values(tables: Tables) -> dict[str, str]:
    """The numbers of the paper's text by key."""
    return {number.key: number.value for number in all_numbers(tables)}


def test_a_subset_is_called_one_everywhere(tables: Tables) -> None:
    name = "LongBench subset (72 rows)"
    assert suite_tables.suite_name(tables, "longbench") == name
    assert name in rows(suite_tables.summary(tables))[0]
    assert values(tables)["longbench"] == name
    assert "(12)" in rows(suite_tables.scores(tables, "longbench"))[0][1]
    whole = tables.evaluations.assign(rows_available=200.0)
    complete = replace(tables, evaluations=whole)
    assert suite_tables.suite_name(complete, "longbench") == "LongBench"


def test_a_suite_without_tasks_is_told(tables: Tables) -> None:
    kept = tables.evaluations[tables.evaluations.suite == "perplexity"]
    less = replace(tables, evaluations=kept)
    for name in ("passkey", "ruler", "longbench"):
        assert build_table(name, less).splitlines()[1].startswith("This study has no")
    assert len(rows(suite_tables.summary(less))[0]) == 5


@pytest.fixture(scope="module")
def partial(tables: Tables) -> Tables:
    """Where two caches lack tasks that others have, and a cache's size depends on the task.

    KIVI 4 bits lacks two tasks of RULER, KIVI 2 bits the first perplexity task.
    """
    values = tables.evaluations
    lacking = (values.scheme == "kivi-4") & values.task.isin(["ruler-vt", "ruler-cwe"])
    lacking |= (values.scheme == "kivi-2") & (values.task == "ppl-wikitext2-b")
    values = values[~lacking].copy()
    later = values.task.isin(["ppl-wikitext2-a", "ppl-wikitext2-full-b"])
    values.loc[later, ["value", "cache_bytes", "kl"]] *= 1.5
    front = pareto_table(tables.study, values, tables.perf, tables.energy)
    return replace(tables, evaluations=values, pareto=front)


def row_of(text: str, scheme: str) -> dict[str, str]:
    """The cells of a scheme's row by their heads, numbers without marks."""
    head, *body = rows(text)
    found = next(row for row in body if row[0] == scheme)
    return {name: cell.split(r"\makebox")[0] for name, cell in zip(head, found, strict=True)}


def test_a_mean_of_some_tasks_is_no_mean_of_the_suite(partial: Tables) -> None:
    text = suite_tables.summary(partial)
    assert row_of(text, "KIVI 4 bits")["RULER"] == "-"
    assert row_of(text, NUQ.format(4))["RULER"] != "-"
    front = partial.pareto.set_index("scheme")
    assert np.isnan(front.loc["kivi-4", ["ruler", "ruler_change"]].astype(float)).all()
    assert "kivi-4.ruler" not in values(partial) and "nuq4-1pct.ruler" in values(partial)


def test_sizes_and_perplexity_of_one_row_are_of_one_task(partial: Tables) -> None:
    """The comparison of caches does not depend on which other tasks each of them ran."""
    rows_of = partial.evaluations
    first = rows_of[(rows_of.task == "ppl-wikitext2-b") & (rows_of.scheme == "nuq4-1pct")]
    cells = row_of(suite_tables.summary(partial), NUQ.format(4))
    assert cells["bits"] == "4.60" and cells["perplexity"] == f"{first.value.mean():.2f}"
    assert cells["KL, nats"] == f"{first.kl.mean():.4f}"
    found = values(partial)
    assert found["nuq4-1pct.ppl-wikitext2-b"] == f"{first.value.mean():.2f}"
    assert found["quality-task"] == partial.labels.task("ppl-wikitext2-b")
    sizes = row_of(build_table("memory", partial), NUQ.format(4))
    assert sizes[partial.labels.task("ppl-wikitext2-b")] == "4.60"


def test_a_cache_without_the_first_task_has_dashes_and_is_not_judged(partial: Tables) -> None:
    cells = row_of(suite_tables.summary(partial), "KIVI 2 bits")
    assert (cells["bits"], cells["perplexity"], cells["KL, nats"]) == ("-", "-", "-")
    assert row_of(build_table("memory", partial), "KIVI 2 bits")["passkey, 1,024 tokens"] == "2.60"
    front = partial.pareto.set_index("scheme")
    assert front.dominated.isna().to_dict()["kivi-2"] and not front.dominated["fp16"]


TAILS = ["kl_p99", "kl_p999", "top1_agreement"]


def test_the_tails_of_the_divergence_have_a_table(tables: Tables) -> None:
    head, *body = rows(build_table("divergence", tables))
    assert head[:4] == ["task", "scheme", "bits", "KL, mean"]
    assert head[4:] == ["KL, 99th percentile", "KL, 99.9th percentile", "same top-1 token"]
    assert {row[0] for row in body} == {
        name for key, name in tables.labels.tasks.items() if key.startswith("ppl")
    }
    two = next(row for row in body if row[1] == NUQ.format(2))
    assert two[3:] == ["0.1500", "2.100", "4.700", r"80.00 \%"]
    assert next(row for row in body if row[1] == "16-bit cache")[3:] == [
        "0.0000",
        "0.000",
        "0.000",
        r"100.00 \%",
    ]


def test_records_from_before_there_were_percentiles_have_no_such_table(tables: Tables) -> None:
    none = tables.evaluations.assign(**dict.fromkeys(TAILS, np.nan))
    for evaluations in (none, none.drop(columns=TAILS)):
        text = build_table("divergence", replace(tables, evaluations=evaluations))
        assert text.splitlines()[1:] == [TABLES["divergence"].reason]


def test_a_mean_over_seeds_needs_all_seeds(tables: Tables) -> None:
    values = tables.evaluations.copy()
    values.loc[(values.scheme == "nuq2-1pct") & (values.seed == 1), "kl_p999"] = np.nan
    head, *body = rows(build_table("divergence", replace(tables, evaluations=values)))
    at = head.index("KL, 99.9th percentile")
    assert {row[at] for row in body if row[1] == NUQ.format(2)} == {"-"}
    assert {row[at] for row in body if row[1] == NUQ.format(3)} == {"1.410"}


def test_divergences_and_verdicts_are_numbers_of_the_text(tables: Tables) -> None:
    found = values(tables)
    assert {"nuq3-1pct.ppl-wikitext2-b-kl-p999", "nuq3-1pct.ruler-verdict"} <= set(found)


def test_marked_cells_stay_latex_and_text_is_escaped() -> None:
    import pandas as pd

    table = pd.DataFrame([{"a_b": Latex(r"1$\approx$"), "c": "5 %"}], dtype=object)
    assert rows(booktabs(table, "lr")) == [[r"a\_b", "c"], [r"1$\approx$", r"5 \%"]]


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"append", "kernels", "roofline"}))
def test_every_figure_is_drawn(tables: Tables, folder: Path, name: str, tmp_path: Path) -> None:
    figure = draw_figure(name, tables.study, folder)
    figure.savefig(tmp_path / "figure.pdf")
    plt.close(figure)
    assert (tmp_path / "figure.pdf").stat().st_size > 3000


def test_accuracy_tables_of_an_unfinished_study(
    root: Path, folder: Path, tables: Tables, tmp_path: Path
) -> None:
    """Two tasks of one scheme are missing, and nothing was timed."""
    for name in ("eval", "tests"):
        table = pd.read_parquet(folder / f"{name}.parquet")
        missing = (table["scheme"] == "kivi-4") & table["task"].isin(["ruler-vt", "ruler-cwe"])
        if name == "tests":
            missing |= (table["scheme"] == "kivi-4") & (table["level"] == "suite")
        write_table(table[~missing], tmp_path / f"{name}.parquet")
    args = argparse.Namespace(
        study=str(root / "config/config.yaml"),
        tables=tmp_path,
        out_dir=tmp_path / "tex",
        numbers=None,
        present=True,
    )
    latex.run(args)
    assert {f.stem for f in (tmp_path / "tex").iterdir()} == {
        name for name, table in of_study(tables.study).items() if table.of_evaluations
    }
    cells = rows((tmp_path / "tex/ruler.tex").read_text(encoding="utf-8"))
    kivi = next(row for row in cells if row[0] == "KIVI 4 bits")
    assert [cell.startswith("-") for cell in kivi[1:]].count(True) == 3  # and the mean
    args.numbers = tmp_path / "numbers.tex"
    with pytest.raises(UserError, match="--numbers"):
        latex.run(args)
