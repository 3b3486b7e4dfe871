"""Reads a fetched text by its manifest, split into calibration part and test part."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from kvquant.errors import UserError
from kvquant.formats.files import read_bytes, read_json
from kvquant.study.datasets import DATASETS
from kvquant.study.own_texts import OwnText

SCHEMA_VERSION = 1
FIELD = "--data-manifest"
AGAIN = "fetch it again"
FIELDS = {
    **{"dataset": str, "source": str, "sha256": str},
    **{"characters": int, "test_from": int, "file": str},
}
SHA256 = re.compile(r"[0-9a-f]{64}")
FETCHED = ("pypi", "hub", "data_dir")  # any other source is the user's own text
Part = Literal["all", "calibration", "test"]


@dataclass(frozen=True)
class DataManifest:
    """Describes a text in the folder of its manifest.

    Attributes:
        dataset: Name of the data set.
        source: "pypi", "data_dir" or "hub", or another name for a user's own text.
        sha256: Hash of the text's UTF-8 bytes.
        characters: Length of the text.
        test_from: Index of the character where the test part starts; 0 if all is test text.
        file: Path of the text.
        own: What the user's own files hold (`OwnText.identity`); None for other data sets.
    """

    dataset: str
    source: str
    sha256: str
    characters: int
    test_from: int
    file: Path
    own: dict[str, Any] | None = None


def _checked(file: Path, raw: Any) -> DataManifest:
    """Returns a manifest, or raises ValueError if `fetch-data` would not have written it."""
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    for name, expected in FIELDS.items():
        if name not in raw:
            raise ValueError(f"{name} is missing")
        if type(raw[name]) is not expected or raw[name] == "":
            raise ValueError(f"{name}: not a {'number' if expected is int else 'text'}")
    if not SHA256.fullmatch(raw["sha256"]):
        raise ValueError("sha256: no sha256")
    if not 0 <= raw["test_from"] <= raw["characters"]:
        raise ValueError(f"test_from: {raw['test_from']} is not within the text")
    if PurePath(raw["file"]).name != raw["file"] or raw["file"] == ".." or "\0" in raw["file"]:
        raise ValueError(f"file: '{raw['file']}' must be a name inside the manifest's folder")
    found = DataManifest(
        **{n: raw[n] for n in FIELDS if n != "file"},
        file=file.parent / raw["file"],
        own=raw.get("own"),
    )
    if found.source in FETCHED:
        known = DATASETS.get(found.dataset)
        if known is not None and known.pinned is not None:
            for name, must in asdict(known.pinned).items():
                if (is_ := getattr(found, name)) != must:
                    raise ValueError(f"{name}: {is_}, but '{found.dataset}' has {must}")
        if known is not None and known.test_only and found.test_from != 0:
            raise ValueError(f"test_from: '{found.dataset}' is test text only")
    return found


def read_data_manifest(path: str | Path, dataset: str | None = None) -> DataManifest:
    """Reads `manifest.json` as written by `kvquant fetch-data`.

    Args:
        path: Path of the manifest.
        dataset: The expected data set; None accepts any.

    Raises:
        UserError: The manifest is missing or damaged, points outside its folder, differs from the
            data set's known values, or is of another data set.
    """
    file = Path(path)
    raw = read_json(file, FIELD, AGAIN)
    try:
        found = _checked(file, raw)
    except ValueError as error:
        raise UserError(f"{FIELD}: {file} is damaged ({error}): {AGAIN}") from None
    if dataset not in (None, found.dataset):
        raise UserError(f"{FIELD}: {file} is of '{found.dataset}', not of '{dataset}'")
    return found


def load_text(
    path: str | Path,
    part: Part = "all",
    dataset: str | None = None,
    own: OwnText | None = None,
) -> str:
    """Returns a text or a part of it, after checking its hash.

    Args:
        path: Path of the manifest.
        part: "calibration" is the text before the manifest's `test_from` and "test" the rest, so
            that perplexity is never measured on text that codebooks were fitted to.
        dataset: The expected data set; None accepts any.
        own: The study's entry of the data set, if it is one of the user's own files.

    Raises:
        UserError: The text is missing, was changed, was made of other files, or has no calibration
            part.
    """
    manifest = read_data_manifest(path, dataset)
    if own is not None and manifest.own != own.identity():
        raise UserError(
            f"{FIELD}: {path} was made of other files, or with another test_share, than the "
            f"study's datasets.{manifest.dataset}: {AGAIN}"
        )
    if not manifest.file.exists() and not manifest.file.is_symlink():
        raise UserError(f"{FIELD}: {manifest.file} is missing: {AGAIN}")
    raw = read_bytes(manifest.file, FIELD, AGAIN)
    if hashlib.sha256(raw).hexdigest() != manifest.sha256:
        raise UserError(
            f"{FIELD}: {manifest.file} is not the text of its manifest (sha256 differs): "
            "delete both and fetch again"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{FIELD}: {manifest.file}: damaged: byte {error.start} is not UTF-8: {AGAIN}"
        ) from None
    if len(text) != manifest.characters:
        raise UserError(
            f"{FIELD}: {path} is damaged (characters: {manifest.characters}, the text has "
            f"{len(text)}): {AGAIN}"
        )
    if part == "calibration" and manifest.test_from == 0:
        raise UserError(
            f"calibration.dataset: '{manifest.dataset}' is test text only: use another data set"
        )
    if part == "calibration":
        return text[: manifest.test_from]
    return text[manifest.test_from :] if part == "test" else text
