"""`kvquant companion`: makes the numbers, tables and figures of another published study.

A paper speaks about several studies, and a run of the workflow is about one. What it shows of the
others rests on their published records alone, and nothing is measured. Of a study without published
records there are facts of the study and empty tables.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from kvquant.analysis import figure_list, table_list
from kvquant.analysis.companion_tables import collect_published
from kvquant.analysis.latex import write_paper_tables
from kvquant.analysis.numbers.number_list import all_numbers
from kvquant.analysis.numbers.writing import write_numbers
from kvquant.analysis.pareto import pareto_table
from kvquant.analysis.plot import draw_with_records, save_figure
from kvquant.analysis.statistics import test_all
from kvquant.analysis.study_tables import load_tables
from kvquant.analysis.tables import write_table
from kvquant.study.config import Study, load_study


def write_tables(study: Study, folder: Path) -> None:
    """Writes the tables of a study from its published records.

    Raises:
        UserError: The study names no published records, or one of them cannot be used.
    """
    tables = collect_published(study)
    tables["tests"] = test_all(study, tables["eval"], tables["samples"])
    tables["pareto"] = pareto_table(study, tables["eval"], tables["perf"], tables["energy"])
    for name, table in tables.items():
        write_table(table, folder / f"{name}.parquet")


def run(args: argparse.Namespace) -> None:
    """Writes numbers.tex, its CSV twin, all tables and all figures of the study."""
    study = load_study(args.study)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tables(study, folder)
        tables = load_tables(study, folder)
        write_numbers(all_numbers(tables), args.out_dir / "numbers.tex")
        write_paper_tables(tables, args.out_dir / "tables", table_list.of_study(study))
        for name in figure_list.shown(study):
            figure, source = draw_with_records(name, study, folder)
            save_figure(figure, args.out_dir / f"figures/{name}.pdf", source)
    print(f"companion: {study.study}: numbers, tables and figures in {args.out_dir}")
