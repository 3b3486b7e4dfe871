"""What tests of the report share: a small study with its pages, as the workflow leaves them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import pytest

from kvquant.analysis import claims, figure_list, html_tables, page_list
from kvquant.analysis.explorer.page import page as explorer_page
from kvquant.analysis.landing import page as landing
from tests.support.measured import Measured, measure
from tests.support.studies import DEVICE

RESULTS, PAPER = Path("results/h100"), Path("paper")  # where the workflow puts a study by default
COMMAND = "snakemake --cores all --configfile 'of mine.yaml'"
SVG = (
    "<svg xmlns='http://www.w3.org/2000/svg' width='300' height='200'><text y='20'>{}</text></svg>"
)


class Written(NamedTuple):
    """A study whose products are written, and the options of its landing page."""

    measured: Measured
    work: Path
    args: argparse.Namespace


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Everything that the report shows; figures are stand-ins."""
    work = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        RESULTS.mkdir(parents=True)
        measured = measure(RESULTS)
        study, file, tables = measured.study, str(RESULTS / "study.json"), RESULTS / "tables"
        pages = [RESULTS / f"report/{name}.html" for name in page_list.shown(study)]
        captions = [page.with_suffix(".rst") for page in pages]
        common = {"study": file, "tables": tables}
        out = {"out": tables / "claims.csv", "tex": PAPER / "tables/claims.tex"}
        claims.run(argparse.Namespace(**common, **out))
        html_tables.run(argparse.Namespace(**common, out=[*pages, *captions]))
        explorer = RESULTS / "explorer.html"
        explorer.write_text(explorer_page(measured.data), encoding="utf-8")
        figures = [PAPER / f"figures/{name}.svg" for name in figure_list.shown(study)]
        figures[0].parent.mkdir(parents=True)
        for figure in figures:
            figure.write_text(SVG.format(figure.stem), encoding="utf-8")
            figure.with_suffix(".pdf").write_text(figure.stem, encoding="utf-8")
        args = argparse.Namespace(
            **common, results=RESULTS, device_name=DEVICE, figures=figures, pages=pages,
            explorer=explorer, command=COMMAND, out=RESULTS / "report/landing.html",
        )  # fmt: skip
        landing.run(args)
    return Written(measured, work, args)
