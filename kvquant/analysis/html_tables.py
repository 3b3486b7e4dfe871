"""`kvquant html`: the claims and tables as HTML pages with captions, for the report."""

from __future__ import annotations

import argparse
import html
from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.analysis.claims import judge, load_tables
from kvquant.analysis.evidence import NOT_SUPPORTED, SUPPORTED
from kvquant.analysis.tables import read_table
from kvquant.config import Study, load_study
from kvquant.errors import unknown
from kvquant.files import replace

# Table -> (collected table, caption, columns; all where none are named).
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "claims": (
        "claims",
        "Each claim with its definition, what was measured in this study, on how much "
        "evidence, and the verdict.",
        (),
    ),
    "summary": (
        "pareto",
        "A row per model and scheme: mean accuracy by suite, bits per element with everything "
        "included, and speed and energy over the unquantized cache on the workload that is named "
        "(energy where counters measured it).",
        (),
    ),
    "tests": (
        "tests",
        "Every comparison with the unquantized cache: difference with its interval, tests, margin "
        "and verdict.",
        (),
    ),
    "accuracy": ("eval", "Every result of an evaluation: one seed of one task.", ()),
    "throughput": (
        "perf",
        "Every throughput job: a scheme and the baseline from the same process.",
        (
            *("device", "model", "scheme", "workload", "rep", "scheme_status"),
            *("scheme_prefill_tokens_per_s", "base_prefill_tokens_per_s", "prefill_ratio"),
            *("decode_ratio", "quantize_share", "scheme_rounds"),
        ),
    ),
    "energy": (
        "energy",
        "Every energy job. No claim rests on a source that says 'estimated'.",
        (
            *("device", "model", "scheme", "workload", "rep", "source"),
            *("scheme_joules_per_token", "base_joules_per_token", "energy_ratio", "scheme_trials"),
        ),
    ),
}
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5em; color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; }
caption { text-align: left; padding: 0 0 .8em; max-width: 60em; color: #444; }
th { text-align: left; border-bottom: 2px solid #333; position: sticky; top: 0; background: #fff; }
th, td { padding: .35em .8em .35em 0; vertical-align: top; }
td { border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.yes { color: #00694a; font-weight: 600; }
td.no { color: #a63a00; font-weight: 600; }
"""


def _cell(value: Any) -> str:
    """A cell: numbers to the right, verdicts in colour."""
    if value is None or value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return "<td class='number'>-</td>"
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int | float):
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
        return f"<td class='number'>{shown}</td>"
    mark = {SUPPORTED: " class='yes'", NOT_SUPPORTED: " class='no'"}.get(str(value), "")
    return f"<td{mark}>{html.escape(str(value))}</td>"


def page(table: pd.DataFrame, title: str, caption: str) -> str:
    """A page with one table; everything in it is escaped."""
    heads = "".join(f"<th>{html.escape(str(c).replace('_', ' '))}</th>" for c in table.columns)
    rows = [
        f"<tr>{''.join(map(_cell, row))}</tr>"
        for row in table.astype(object).itertuples(index=False)
    ]
    body = "\n".join(rows) or "<tr><td>Nothing of this kind was measured in this study.</td></tr>"
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<table><caption>{html.escape(caption)}</caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></body></html>\n"
    )


def table_of(study: Study, folder: Path, name: str) -> pd.DataFrame:
    """The table of one page."""
    source, _, columns = PAGES[name]
    if source == "claims":
        return judge(load_tables(study, folder))
    table = read_table(folder, source)
    return table[[c for c in columns if c in table]] if columns and len(table) else table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant html`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--tables", required=True, type=Path, help="folder of collected tables")
    parser.add_argument(
        "--out", required=True, nargs="+", type=Path, help=f"FOLDER/NAME.html: {', '.join(PAGES)}"
    )


def run(args: argparse.Namespace) -> None:
    """Writes every page asked for; a file's name says which table it shows."""
    study = load_study(args.study)
    for file in args.out:
        if file.stem not in PAGES:
            raise unknown("table", file.stem, PAGES)
        title = f"{study.title or study.study}: {file.stem}"
        replace(file, page(table_of(study, args.tables, file.stem), title, PAGES[file.stem][1]))
        print(f"html: {file}")
