"""`kvquant tables`: writes the paper's LaTeX tables, its numbers, and its list of floats."""

from __future__ import annotations

import argparse

from kvquant.analysis import figure_list, table_list
from kvquant.analysis.booktabs import HEAD, escape
from kvquant.analysis.macros import numbers
from kvquant.analysis.sections import Section
from kvquant.analysis.study_tables import Tables, load_tables
from kvquant.analysis.suite_tables import suite_name
from kvquant.errors import UserError
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


def _shown_in(section: Section, tables: Tables) -> list[str]:
    """Returns the lines of a section: each table with its figure, then the other figures."""
    drawn = [
        name
        for name in figure_list.shown(tables.study)
        if figure_list.FIGURES[name].section == section
    ]
    lines = []
    for name, table in table_list.of_study(tables.study).items():
        if table.section != section:
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
    """Returns macros that show all tables and figures of a part of the paper, with captions."""
    parts = []
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
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        (args.out_dir / f"{name}.tex").write_text(build_table(name, tables), encoding="utf-8")
    if args.numbers is not None:
        args.numbers.write_text(numbers(tables), encoding="utf-8")
        args.numbers.with_name("floats.tex").write_text(floats(tables), encoding="utf-8")
        chosen += ["numbers", "floats"]
    print(f"tables: {', '.join(chosen)}")
