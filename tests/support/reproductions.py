"""Published records of a small study, and the same results measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from kvquant.cli import main
from kvquant.study.config import Study
from kvquant.study.publish import publish
from kvquant.study.records import record_text, write_samples
from kvquant.study.samples import parse_samples
from kvquant.study.seal import KINDS
from kvquant.study.tasks import SUITES
from tests.support.studies import write_study

Edit = Callable[[dict[str, Any], list[dict[str, Any]]], object]


def published_study(study: Study, folder: Path) -> Study:
    """Publishes all records of a study below a folder; returns the study that names them."""
    write_study(study, folder / "first")
    publish(folder / "first", folder / "published")
    return study.model_copy(update={"published": str(folder / "published")})


def measured_otherwise(file: Path, edit: Edit) -> None:
    """Writes a record anew as if its job had measured other numbers.

    Args:
        file: The record's file.
        edit: Changes the record's fields and its samples; what follows from samples is computed.
    """
    record = json.loads(file.read_text())
    lines = file.with_name("samples.jsonl")
    evaluated = record["kind"] == "eval"
    rows = parse_samples(lines.read_text(), record["suite"]) if evaluated else []
    edit(record, rows)
    if evaluated:
        summary = SUITES[record["suite"]].summary(rows)
        record["metrics"] |= summary.metrics
        record["value"], record["tokens"] = record["metrics"][record["metric"]], summary.tokens
        record["bits_per_element"] = 8 * record["cache_bytes"] / record["cache_elements"]
        lines.unlink()
        record["samples_sha256"] = write_samples(lines, rows)
    file.write_text(record_text(KINDS[record["kind"]].model_validate(record)))


def reproduce(study: Study, folder: Path, results: Path, *options: str) -> int:
    """Compares results with the published ones; the page and the table lie in `folder`."""
    file = folder / "asked.json"
    file.write_text(study.model_dump_json())
    words = ["reproduce", "--study", str(file), "--results", str(results)]
    words += ["--out", str(folder / "reproduce.html"), "--tables", str(folder / "tables")]
    return main([*words, *options])


def rows_of(folder: Path, quantity: str, what: str = "", scheme: str = "") -> pd.DataFrame:
    """The rows of a quantity that :func:`reproduce` wrote, of what begins so."""
    table = pd.read_parquet(folder / "tables/reproduce.parquet")
    mine = table[(table["quantity"] == quantity) & table["what"].str.startswith(what)]
    return mine[mine["scheme"] == scheme] if scheme else mine
