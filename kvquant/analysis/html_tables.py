"""`kvquant html`: writes claims and tables as HTML pages, and their captions, for the report."""

from __future__ import annotations

import argparse
import html
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.analysis.ablation_tables import all_rows
from kvquant.analysis.carbon import UNIT, explained, with_grams
from kvquant.analysis.claims import judge, named, readable
from kvquant.analysis.evidence import NOT_SUPPORTED, SUPPORTED
from kvquant.analysis.labels import job_label, labels_of
from kvquant.analysis.page_list import PAGES, check
from kvquant.analysis.study_tables import load_tables
from kvquant.analysis.tables import read_table
from kvquant.formats.files import replace
from kvquant.study.config import Study, load_study

# Letters of a name, which no line break cuts, and of texts, which get room.
NAME, TEXT, LONG_TEXT = 24, 60, 200
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5em; color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; }
caption { text-align: left; padding: 0 0 .8em; color: #444;
  max-width: min(60em, calc(100vw - 3em)); }
th { text-align: left; border-bottom: 2px solid #333; position: sticky; top: 0; background: #fff; }
th, td { padding: .35em .8em .35em 0; vertical-align: top; }
td { border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
td.name { white-space: nowrap; }
td.phrase { min-width: 8em; }
td.text { min-width: 15em; }
td.long { min-width: 30em; }
td.yes { color: #00694a; font-weight: 600; }
td.no { color: #a63a00; font-weight: 600; }
"""


def _number(value: float) -> str:
    """Returns a number with four significant digits, without an exponent where it reads well."""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.1g}"


def _cell(value: Any) -> str:
    """Returns a cell with numbers to the right and verdicts in color."""
    if value is None or value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return "<td class='number'>-</td>"
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int | float):
        return f"<td class='number'>{_number(value)}</td>"
    mark = {SUPPORTED: " class='yes'", NOT_SUPPORTED: " class='no'"}.get(str(value), "")
    if not mark and len(str(value)) <= NAME:
        mark = " class='name'"
    elif not mark:
        letters = len(str(value))
        kind = "phrase" if letters <= TEXT else "text" if letters <= LONG_TEXT else "long"
        mark = f" class='{kind}'"
    return f"<td{mark}>{html.escape(str(value))}</td>"


def _side(column: pd.Series) -> str:
    """Returns the class of a head, which stands to the right over numbers."""
    numbers = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    return " class='number'" if numbers else ""


def page(table: pd.DataFrame, title: str, caption: str) -> str:
    """Returns a page with one table, in which everything is escaped."""
    heads = "".join(
        f"<th{_side(table.iloc[:, i])}>{html.escape(str(head).replace('_', ' '))}</th>"
        for i, head in enumerate(table.columns)
    )
    rows = [
        f"<tr>{''.join(map(_cell, row))}</tr>"
        for row in table.astype(object).itertuples(index=False)
    ]
    body = "\n".join(rows) or "<tr><td>Nothing of this kind was measured in this study.</td></tr>"
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<table><caption>{html.escape(caption)}</caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></body></html>\n"
    )


_GIGABYTES = {"memory_gb": "memory_bytes", "weights_gb": "weight_bytes", "peak_gb": "peak_bytes"}


def _jobs(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of whole jobs with names of cases, and with gigabytes beside bytes."""
    names = {name: job_label(case) for name, case in study.job_cases().items()}
    sizes = {new: table[old] / 1e9 for new, old in _GIGABYTES.items() if old in table}
    return table.assign(case=table["case"].map(names), **sizes)


def table_of(study: Study, folder: Path, name: str) -> pd.DataFrame:
    """Returns the table of one page with its heads, without columns that are empty."""
    shown = PAGES[name]
    if shown.source == "claims":
        table = readable(named(study, judge(load_tables(study, folder))))
    elif shown.source == "ablation":
        table = labels_of(study).of(all_rows(load_tables(study, folder)))
    else:
        found = read_table(folder, shown.source)
        found = _jobs(study, found) if shown.source == "jobs" else found
        table = labels_of(study).of(found, energy=shown.source == "energy")
    if shown.measured:
        table = table[table.reindex(columns=list(shown.measured)).notna().any(axis=1)]
    table, heads = with_grams(study, table, shown.heads, shown.joules)
    columns = [c for c in heads if c in table and (table[c].notna() & (table[c] != "")).any()]
    # heads may be equal ("difference"): the column before says of what
    return table[columns].set_axis([heads[c] for c in columns], axis=1)


def caption_of(study: Study, name: str, table: pd.DataFrame) -> str:
    """Returns the caption of a page, which says what grams of CO2e are where the page has some.

    Args:
        study: The study.
        name: The page.
        table: What :func:`table_of` returned for it.
    """
    note = explained(study) if any(UNIT in str(head) for head in table.columns) else ""
    return " ".join(filter(None, (PAGES[name].caption, note)))


def as_restructured(text: str) -> str:
    """Returns plain text as reStructuredText in a template of Jinja, in which nothing is markup."""
    marked = re.sub(r"([\\*`_|])", r"\\\1", text)
    # braces of a template in two pieces of text, as neither {{ nor {% nor {# may stand in it
    return re.sub(r"\{(?=[{%#])", "{{ '{' }}", marked) + "\n"


def run(args: argparse.Namespace) -> None:
    """Writes every page and caption asked for; a file's name says which table it is about."""
    study = load_study(args.study)
    made: dict[str, pd.DataFrame] = {}
    for file in args.out:
        name = file.stem
        check(study, name)
        table = made[name] if name in made else table_of(study, args.tables, name)
        made[name] = table
        caption = caption_of(study, name, table)
        title = f"{study.title or study.study}: {PAGES[name].label}"
        text = as_restructured(caption) if file.suffix == ".rst" else page(table, title, caption)
        replace(file, text)
        print(f"html: {file}")
