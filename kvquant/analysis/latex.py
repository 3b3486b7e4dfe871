"""`kvquant tables`: writes the paper's LaTeX tables, its numbers, and its list of floats."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from kvquant.analysis import figure_list, table_list
from kvquant.analysis.booktabs import HEAD, escape
from kvquant.analysis.numbers.number_list import all_numbers
from kvquant.analysis.numbers.writing import write_numbers
from kvquant.analysis.provenance import records_of, told
from kvquant.analysis.sections import Section
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.analysis.suite_tables import suite_name
from kvquant.errors import UserError
from kvquant.formats.files import replace
from kvquant.study.config import load_study
from kvquant.study.dotted import load
from kvquant.study.tasks import SUITES

# The paper's sections of tables and figures: the name of a macro, and what it shows.
PARTS = {
    "AccuracyFloats": (Section.ACCURACY_BY_TASK, Section.ABLATION),
    "CostFloats": (Section.ACCURACY_AGAINST_COST, Section.THROUGHPUT, Section.ENERGY),
    "ComparisonFloats": (Section.STATISTICS,),
}


def build_table(name: str, tables: Tables) -> str:
    """Returns a LaTeX table, or a sentence where the study has nothing to show in it.

    Args:
        name: One of :func:`kvquant.analysis.table_list.of_study`.
        tables: The collected tables.
    """
    table = table_list.of_study(tables.study)[name]
    if not table.condition(tables):
        return f"{HEAD}{escape(table.reason)}\n"
    return str(load(table.build)(tables, *table.arguments))


def write_paper_tables(tables: Tables, folder: Path, chosen: Iterable[str]) -> None:
    """Writes LaTeX tables; each file names the number of records that it rests on and their hash.

    Args:
        tables: The collected tables.
        folder: Gets a file NAME.tex per table.
        chosen: Names of :func:`kvquant.analysis.table_list.of_study`.
    """
    known = table_list.of_study(tables.study)
    for name in chosen:
        rows = [getattr(tables, frame) for frame in known[name].reads]
        source = f"% from {told(records_of(*rows))}\n"
        text = build_table(name, tables).removeprefix(HEAD)
        replace(folder / f"{name}.tex", HEAD + source + text)


def _shown_in(section: Section, tables: Tables) -> list[str]:
    """Returns the lines of a section: each table with its figure, then the other figures.

    A table with nothing to show is left out.
    """
    drawn = [
        name
        for name in figure_list.shown(tables.study)
        if figure_list.FIGURES[name].section == section
    ]
    lines = []
    for name, table in table_list.of_study(tables.study).items():
        if table.section != section or not table.condition(tables):
            continue
        caption = table.caption
        if name in SUITES:
            caption = caption.format(suite=suite_name(tables, name))
        if table.note:
            caption = f"{caption} {load(table.note)(tables)}".rstrip()
        lines.append(rf"\generated{{{escape(caption)}}}{{{name}}}")
        if name in drawn:
            drawn.remove(name)
            lines.append(_figure(name))
    return lines + [_figure(name) for name in drawn]


def _figure(name: str) -> str:
    return rf"\drawn{{{name}}}{{{escape(figure_list.FIGURES[name].caption)}}}"


def floats(tables: Tables) -> str:
    """Returns macros that show all tables and figures of a part of the paper, with captions.

    The captions of figures are macros of their own as well, for figures that stand elsewhere.
    """
    parts = [
        f"\\kvcaption{{{name}}}{{{escape(figure_list.FIGURES[name].caption)}}}"
        for name in figure_list.FIGURES
    ]
    for macro, sections in PARTS.items():
        lines = [line for section in sections for line in _shown_in(section, tables)]
        parts += [f"\\newcommand{{\\kv{macro}}}{{%", *lines, "}"]
    return HEAD + "\n".join(parts) + "\n"


def run(args: argparse.Namespace) -> None:
    """Writes every table and the numbers."""
    if args.present == (args.numbers is not None):
        raise UserError("--numbers: is needed, and left out with --present")
    tables = load_tables(load_study(args.study), args.tables, accuracy_only=args.present)
    known = table_list.of_study(tables.study)
    chosen = [name for name, table in known.items() if table.of_evaluations or not args.present]
    write_paper_tables(tables, args.out_dir, chosen)
    if args.numbers is not None:
        write_numbers(all_numbers(tables), args.numbers)
        args.numbers.with_name("floats.tex").write_text(floats(tables), encoding="utf-8")
        chosen += ["numbers", "floats"]
    print(f"tables: {', '.join(chosen)}")
