"""A fetched text: its manifest, its hash, and the part of it that calibration must not see."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvquant.errors import UserError

SCHEMA_VERSION = 1
Part = Literal["all", "calibration", "test"]


@dataclass(frozen=True)
class DataManifest:
    """A text beside its manifest.

    Attributes:
        dataset: Name.
        source: "pypi", "data_dir" or "hub".
        sha256: Hash of the text's UTF-8 bytes.
        characters: Length of the text.
        test_from: Character where the test part starts; 0: all of it is test text.
        file: Path of the text.
    """

    dataset: str
    source: str
    sha256: str
    characters: int
    test_from: int
    file: Path


def read_data_manifest(path: str | Path) -> DataManifest:
    """Reads `manifest.json` as written by `kvquant fetch-data`.

    Raises:
        UserError: It is missing or damaged.
    """
    file = Path(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return DataManifest(
            dataset=str(raw["dataset"]),
            source=str(raw["source"]),
            sha256=str(raw["sha256"]),
            characters=int(raw["characters"]),
            test_from=int(raw["test_from"]),
            file=file.parent / raw["file"],
        )
    except FileNotFoundError:
        raise UserError(f"--data-manifest: no such file: {file}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--data-manifest: {file} is damaged ({error}): fetch it again") from None


def load_text(path: str | Path, part: Part = "all") -> str:
    """The text behind a manifest, checked against its hash.

    Args:
        path: manifest.json.
        part: "test" and "calibration" are the two sides of the manifest's boundary, so that
            perplexity is never measured on text that codebooks were fitted to.

    Raises:
        UserError: The text is missing, was changed, or has no calibration part.
    """
    manifest = read_data_manifest(path)
    try:
        raw = manifest.file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"--data-manifest: {manifest.file} is missing: fetch it again") from None
    if hashlib.sha256(raw).hexdigest() != manifest.sha256:
        raise UserError(
            f"--data-manifest: {manifest.file} is not the text of its manifest (sha256 differs): "
            "delete both and fetch again"
        )
    text = raw.decode("utf-8")
    if part == "calibration" and manifest.test_from == 0:
        raise UserError(
            f"calibration.dataset: '{manifest.dataset}' is test text only; take another data set"
        )
    if part == "calibration":
        return text[: manifest.test_from]
    return text[manifest.test_from :] if part == "test" else text
