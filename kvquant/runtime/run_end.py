"""The closing lines of a finished run: its claims or its results, and the paths of its products."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from kvquant.errors import UserError
from kvquant.formats.files import read_text

NOT_MEASURED = "not measured here"
MOST_TASKS = 4  # that fit on a line


def _rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(read_text(file, file.stem))))


def claim_lines(file: Path) -> list[str]:
    """Returns one line per claim of a finished study, or none if the file cannot be read.

    A study that measures no claim, such as one of the user's own, gets one line for all of them.
    """
    try:
        rows = _rows(file)
        if rows and all(row["verdict"] == NOT_MEASURED for row in rows):
            return [f"  {NOT_MEASURED:<20} all {len(rows)}, for the reasons in {file}"]
        several = len({row["model"] for row in rows} - {"any"}) > 1
        return [
            f"  {row['verdict']:<20} {row['claim']}"
            f"{' (' + row['model'] + ')' if several else ''}: {row['measured']}"
            for row in rows
        ]
    except (UserError, KeyError, TypeError, csv.Error):
        return []


def result_lines(tables: Path, baseline: str) -> list[str]:
    """Returns one line per model and scheme of a study of few tasks: bits, means and verdicts.

    Args:
        tables: Folder of the collected tables.
        baseline: The scheme that the others are compared with.
    """
    try:
        tests = [row for row in _rows(tables / "tests.csv") if row["level"] == "task"]
        if not tests or len({row["task"] for row in tests}) > MOST_TASKS:
            return []
        several = len({row["model"] for row in tests}) > 1
        lines = []
        for held in _rows(tables / "pareto.csv"):
            mine = [row for row in tests if row["model"] == held["model"]]
            if held["scheme"] == baseline:
                means = {row["task"]: float(row["baseline_mean"]) for row in mine}
                cells = [f"{task} {mean:.4g}" for task, mean in means.items()]
            else:
                cells = [
                    f"{row['task']} {float(row['mean']):.4g} "
                    f"({float(row['difference']):+.3g}, {row['verdict']})"
                    for row in mine
                    if row["scheme"] == held["scheme"]
                ]
            name = f"{held['model']} {held['scheme']}" if several else held["scheme"]
            bits = f"{float(held['bits_per_element']):5.2f} bits"
            lines.append([name, bits, *cells])
    except (UserError, KeyError, TypeError, ValueError, csv.Error):
        return []
    wide = [max(map(len, column)) for column in zip(*lines, strict=False)]
    return [
        "  "
        + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, wide, strict=False)).rstrip()
        for line in lines
    ]


def reproduction_lines(table: Path, page: Path) -> list[str]:
    """Returns one line with the verdicts of a reproduction, or none if it cannot be read.

    Args:
        table: The comparison as a CSV file.
        page: Its page, which the line names.
    """
    try:
        verdicts = Counter(row["verdict"] for row in _rows(table) if row["quantity"])
    except (UserError, KeyError, TypeError, csv.Error):
        return []
    told = ", ".join(f"{count:,} {verdict}" for verdict, count in verdicts.most_common())
    return [f"Measured again: {told or 'nothing to compare'}: {page}"]


def product_lines(products: dict[str, Path]) -> list[str]:
    """Returns one line with the path of each product that exists."""
    return [f"  {name:<8} {path}" for name, path in products.items() if path.exists()]
