"""Writes the tables of config/README.md from the registrations of the package.

`python docs/tables.py` renews every table that stands between two marks. A test holds the page to
it. To change a row, change the registration in `kvquant/study/`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kvquant.study.datatypes import DATATYPES
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.scheme_kinds import SchemeKind
from kvquant.study.schemes import SCHEME_KINDS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "config/README.md"
# One table: a mark with its name, its lines, and a mark that ends it.
BLOCK = re.compile(r"<!-- table: (?P<name>[a-z-]+)[^>]*-->\n.*?<!-- end of table -->", re.S)
MARK = "<!-- table: {name} (written by `python docs/tables.py`) -->"


def _markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    rule = "|---" * len(heads) + "|"
    first, *others = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return "\n".join([first, rule, *others])


def _bits(kind: SchemeKind) -> str:
    return "`bits`" if kind.nominal_bits is None else str(kind.nominal_bits)


def scheme_kinds() -> str:
    """Returns the table of scheme kinds."""
    rows = []
    for kind in SCHEME_KINDS.values():
        needs = ["calibration"] if kind.calibrated else []
        needs += [f"extra `{kind.extra}`"] if kind.extra else []
        what = f"{kind.summary} ({kind.reference})" if kind.reference else kind.summary
        protocols = ", ".join(kind.protocols)
        rows.append([f"`{kind.name}`", what, _bits(kind), protocols, ", ".join(needs)])
    return _markdown(["`kind`", "cache", "bits", "protocols", "needs"], rows)


def datatypes() -> str:
    """Returns the table of datatypes."""
    rows = [
        [f"`{one.name}`", one.summary, "all statistics" if one.fitted else "key ranges only"]
        for one in DATATYPES.values()
    ]
    return _markdown(["`datatype`", "levels", "takes from calibration"], rows)


def model_families() -> str:
    """Returns the table of model families."""
    rows = [
        [family.label, f"`{family.name}`", f"`{family.attention}`"]
        for family in MODEL_FAMILIES.values()
    ]
    return _markdown(["family", "`model_type`", "attention in transformers"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "scheme-kinds": scheme_kinds,
    "datatypes": datatypes,
    "model-families": model_families,
}


def page() -> str:
    """Returns the whole page with its tables renewed."""

    def renewed(found: re.Match[str]) -> str:
        name = found["name"]
        return f"{MARK.format(name=name)}\n{TABLES[name]()}\n<!-- end of table -->"

    text, count = BLOCK.subn(renewed, PAGE.read_text(encoding="utf-8"))
    if count != len(TABLES):
        raise SystemExit(f"{PAGE}: has marks of {count} tables, not of {len(TABLES)}")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
