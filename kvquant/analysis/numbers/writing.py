"""Writes `numbers.tex` and `numbers.csv`: every number of the paper's text, with its records."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from kvquant.analysis.booktabs import HEAD
from kvquant.analysis.numbers.number import Number
from kvquant.analysis.provenance import digest, told
from kvquant.formats.files import replace

COLUMNS = ("key", "value", "digest", "records")


def as_latex(numbers: Iterable[Number]) -> str:
    r"""Returns a line `\kvnumber{KEY}{VALUE}` for each number, with the hash of its records."""
    lines = []
    for number in numbers:
        source = told(number.records) if number.records else "of the study file"
        lines.append(f"\\kvnumber{{{number.key}}}{{{number.value}}}% {source}")
    return HEAD + "\n".join(lines) + "\n"


def as_csv(numbers: Iterable[Number]) -> str:
    """Returns a row per number: key, value, hash of its records, and the records by their seals."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for number in numbers:
        records = " ".join(sorted(number.records))
        rows.writerow([number.key, number.value, digest(number.records), records])
    return text.getvalue()


def write_numbers(numbers: list[Number], file: Path) -> None:
    """Writes a LaTeX file of numbers and its CSV twin."""
    replace(file, as_latex(numbers).encode())
    replace(file.with_suffix(".csv"), as_csv(numbers).encode())
