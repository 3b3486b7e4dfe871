"""The closing lines of a finished run: its claims and the paths of its products."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from kvquant.errors import UserError
from kvquant.formats.files import read_text


def claim_lines(file: Path) -> list[str]:
    """Returns one line per claim of a finished study, or none if the file cannot be read."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(file, "claims"))))
        several = len({row["model"] for row in rows} - {"any"}) > 1
        return [
            f"  {row['verdict']:<20} {row['claim']}"
            f"{' (' + row['model'] + ')' if several else ''}: {row['measured']}"
            for row in rows
        ]
    except (UserError, KeyError, TypeError, csv.Error):
        return []


def product_lines(products: dict[str, Path]) -> list[str]:
    """Returns one line with the path of each product that exists."""
    return [f"  {name:<8} {path}" for name, path in products.items() if path.exists()]
