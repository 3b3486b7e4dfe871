"""`kvquant reproduce`: compares results that somebody measured again with the published ones.

Both sides are verified before anything is compared: edited records, other configurations and other
quantizers are refused by name. What is compared, and within which tolerance, is in
:mod:`kvquant.analysis.reproduction.tolerances`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvquant.analysis.reproduction.page import page
from kvquant.analysis.reproduction.pairs import find
from kvquant.analysis.reproduction.result import compare
from kvquant.analysis.reproduction.rows import DIFFERS
from kvquant.analysis.tables import write_table
from kvquant.errors import UserError
from kvquant.formats.files import replace
from kvquant.study.config import Study, load_study


def _archive(study: Study, given: Path | None) -> Path:
    """Returns the folder of published records to compare with."""
    asked = study.reproduce.published if study.reproduce is not None else None
    found = given or asked or study.published
    if found is None:
        raise UserError("--archive: the study names no published records: name their folder")
    return Path(found)


def run(args: argparse.Namespace) -> int:
    """Writes the page and the table; returns 1 if anything differs and that was asked for."""
    study = load_study(args.study)
    own = args.own_quantizers
    own = own or (study.reproduce is not None and study.reproduce.quantizers == "own")
    archive = _archive(study, args.archive)
    result = compare(study, find(study, args.results, archive, own))
    write_table(result.table(), args.tables / "reproduce.parquet")
    replace(args.out, page(study, result, archive))
    print(f"reproduce: {result.summary}")
    print(f"reproduce: {args.out}")
    return int(args.fail_if_differs and result.count(DIFFERS) > 0)
