"""The files of the paper's numbers."""

from __future__ import annotations

import csv
from pathlib import Path

from kvquant.analysis.numbers.number import Number
from kvquant.analysis.numbers.writing import write_numbers
from kvquant.analysis.provenance import digest

NUMBERS = [Number("a.bits", "3.40", frozenset({"ab" * 6, "cd" * 6})), Number("title", r"5 \%")]


def test_a_line_per_number_with_the_hash_of_its_records(tmp_path: Path) -> None:
    write_numbers(NUMBERS, tmp_path / "paper/numbers.tex")
    lines = (tmp_path / "paper/numbers.tex").read_text().splitlines()[1:]
    both = digest({"ab" * 6, "cd" * 6})
    assert lines == [
        rf"\kvnumber{{a.bits}}{{3.40}}% 2 records {both}",
        r"\kvnumber{title}{5 \%}% of the study file",
    ]


def test_the_table_lists_the_records(tmp_path: Path) -> None:
    write_numbers(NUMBERS, tmp_path / "numbers.tex")
    with (tmp_path / "numbers.csv").open() as stream:
        first, second = csv.DictReader(stream)
    assert first["records"].split() == ["ab" * 6, "cd" * 6]
    assert first["digest"] == digest(first["records"].split())
    assert second["value"] == r"5 \%" and second["digest"] == second["records"] == ""
