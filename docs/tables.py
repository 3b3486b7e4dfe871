"""Writes the tables of config/README.md and docs/library.md from the package's registrations.

`python docs/tables.py` renews every table that stands between two marks. A test holds the pages to
it. To change a row, change the registration in `kvquant/study/`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kvquant.study.datatypes import DATATYPES
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.presets import PRESETS
from kvquant.study.scheme_kinds import SchemeKind
from kvquant.study.schemes import SCHEME_KINDS

ROOT = Path(__file__).resolve().parent.parent
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


def scheme_presets() -> str:
    """Returns the table of schemes with short names."""
    rows = []
    for preset in PRESETS.values():
        kind = preset.scheme.registration
        needs = ["a quantizer"] if kind.calibrated else []
        needs += [f"extra `{kind.extra}`"] if kind.extra else []
        rows.append([f"`{preset.name}`", preset.title, f"`{kind.name}`", ", ".join(needs)])
    return _markdown(["name", "cache", "kind", "needs"], rows)


Tables = dict[str, Callable[[], str]]
PAGES: dict[Path, Tables] = {
    ROOT / "config/README.md": {
        "scheme-kinds": scheme_kinds,
        "datatypes": datatypes,
        "model-families": model_families,
    },
    ROOT / "docs/library.md": {"scheme-presets": scheme_presets},
}


def page(file: Path) -> str:
    """Returns a whole page with its tables renewed."""
    tables = PAGES[file]

    def renewed(found: re.Match[str]) -> str:
        name = found["name"]
        return f"{MARK.format(name=name)}\n{tables[name]()}\n<!-- end of table -->"

    text, count = BLOCK.subn(renewed, file.read_text(encoding="utf-8"))
    if count != len(tables):
        raise SystemExit(f"{file}: has marks of {count} tables, not of {len(tables)}")
    return text


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(page(file), encoding="utf-8")
