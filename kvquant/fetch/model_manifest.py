"""The manifest of a fetched model, and the check that the model's files still match it.

`manifest.json` holds a sha256 of every file that decides what the model computes: weights,
configuration and tokenizer. Loading a model compares them, so that no result comes from a file
that changed after `kvquant fetch-model`. This module does not import torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from kvquant.errors import UserError
from kvquant.fetch.file_hashes import FileHashes
from kvquant.formats.files import canonical_json, path_inside, read_json, sha256_text
from kvquant.study.config import Study
from kvquant.study.digests import weights_digest

FIELD = "--model-manifest"
AGAIN = "fetch it again"
SCHEMA_VERSION = 2
SOURCES = ("pypi-gguf", "hub", "local")
SHA256 = re.compile(r"[0-9a-f]{64}")
WEIGHTS = "*.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a model has one of them
# All files that transformers may read from a folder. One that appears or disappears after
# fetch-model changes the model as much as one with other bytes.
MATTERS = (
    WEIGHTS,
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)


@dataclass(frozen=True)
class ModelManifest:
    """Describes a fetched model.

    Attributes:
        model: Name of the model in the study.
        source: "pypi-gguf", "hub" or "local".
        revision: Commit of a hub model, else None.
        weights_sha256: sha256 of all safetensors files, concatenated in order of their names.
        directory: Folder of the model's files.
        files: sha256 by file name, for every file that decides what the model computes.
        identity: One sha256 over `files` and `weights_sha256`.
        spec_digest: Digest of the study's entry that the model was fetched for.
        dtype: The dtype that the study's entry asks for on a GPU, if any; no part of the file.
    """

    model: str
    source: str
    revision: str | None
    weights_sha256: str
    directory: Path
    files: dict[str, str]
    identity: str
    spec_digest: str | None = None
    dtype: str | None = None


def model_files(folder: Path) -> list[str]:
    """Returns the sorted names of the files that decide what a model computes."""
    found = {path for pattern in MATTERS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def weight_files(names: list[str]) -> list[str]:
    """Returns the names of weight files in the order in which their common hash takes them."""
    return [name for name in sorted(names) if PurePosixPath(name).match(WEIGHTS)]


def identity_of(files: dict[str, str], weights_sha256: str) -> str:
    """Returns one sha256 over everything that decides what a model computes."""
    return sha256_text(canonical_json({"files": files, "weights_sha256": weights_sha256}))


def hash_model(folder: Path, field: str) -> dict[str, Any]:
    """Returns the manifest's hashes of a model: `weights_sha256`, `files` and `identity`.

    Args:
        folder: Folder with config.json, safetensors and a tokenizer.
        field: The option that messages name.

    Raises:
        UserError: A file cannot be read.
    """
    names = model_files(folder)
    hashes = FileHashes(folder, field)
    weights, files = hashes.of_all(weight_files(names))
    files |= {name: hashes.of(name) for name in names if name not in files}
    hashes.remember()
    files = dict(sorted(files.items()))
    return {
        "weights_sha256": weights,
        "files": files,
        "identity": identity_of(files, weights),
    }


def _directory(file: Path, source: str, given: str) -> Path:
    """Returns the model's folder: the manifest's own, or any folder for a local model."""
    if Path(given).is_absolute():
        if source != "local":
            raise ValueError(f"directory '{given}' is outside, but the model's source is not local")
        return Path(given)
    return file.parent if given == "." else path_inside(file.parent, given, f"{FIELD}: {file}")


def _files(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or not raw:
        raise ValueError("files: must name each file with its sha256")
    for name, digest in raw.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not any(path.match(p) for p in MATTERS):
            raise ValueError(f"files: '{name}' is not a file of a model's folder")
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise ValueError(f"files: '{name}' has no sha256")
        if "\0" in name or not name.isprintable():
            raise ValueError("files: a name has characters that cannot be printed")
    return dict(raw)


def read_manifest(path: str | Path) -> ModelManifest:
    """Reads `manifest.json` as written by `kvquant fetch-model`; see :func:`verify_model`.

    Raises:
        UserError: The manifest is missing, damaged, of an older version, or leaves its folder.
    """
    file = Path(path)
    raw = read_json(file, FIELD, AGAIN)
    try:
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        text = {key: raw[key] for key in ("model", "source", "weights_sha256", "directory")}
        for key, value in text.items():
            if not isinstance(value, str) or not value or "\0" in value:
                raise ValueError(f"{key}: not a text")
        revision = raw.get("revision")
        if not isinstance(revision, str | None):
            raise ValueError("revision: not a text")
        if text["source"] not in SOURCES:
            raise ValueError(f"source: '{text['source']}' is unknown")
        if not SHA256.fullmatch(text["weights_sha256"]):
            raise ValueError("weights_sha256: no sha256")
        if "files" not in raw:
            raise UserError(
                f"{FIELD}: {file} is from an older version, without hashes of the model's files: "
                "run fetch-model again (it keeps the manifest's place and the files)"
            )
        return ModelManifest(
            model=text["model"],
            source=text["source"],
            revision=revision,
            weights_sha256=text["weights_sha256"],
            directory=_directory(file, text["source"], text["directory"]),
            files=_files(raw["files"]),
            identity=str(raw["identity"]),
            spec_digest=raw.get("spec_digest"),
        )
    except KeyError as error:
        raise UserError(f"{FIELD}: {file} is damaged ({error} is missing): {AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{FIELD}: {file} is damaged ({error}): {AGAIN}") from None


def manifest_beside(folder: str | Path) -> ModelManifest | None:
    """Returns the manifest that `fetch-model` wrote into a model's folder, or None."""
    file = Path(folder) / "manifest.json"
    if file.is_symlink() or not file.is_file():
        return None  # the target of a link describes the folder that it is in
    raw = read_json(file, FIELD, AGAIN)
    if not isinstance(raw, dict) or raw.get("directory") != "." or "files" not in raw:
        return None  # from another program, or of a model in another folder
    return read_manifest(file)


def study_manifest(path: str | Path, study: Study, model: str) -> ModelManifest:
    """Reads the manifest of a study's model; see :func:`read_manifest`.

    Raises:
        UserError: The manifest is invalid, of another model, or of another source than the
            study's entry.
    """
    found = read_manifest(path)
    if found.model != model:
        raise UserError(f"{FIELD}: {path} is of model '{found.model}', not of '{model}'")
    if found.spec_digest not in (None, weights_digest(study.model(model))):
        raise UserError(
            f"{FIELD}: {path} was fetched for another entry than the study's models.{model} "
            f"(another source, revision, path or package): {AGAIN}"
        )
    return replace(found, dtype=study.model(model).dtype)


def verify_model(manifest: ModelManifest, *, weights: bool = True) -> None:
    """Checks that a model's files are those of its manifest.

    Files that have not changed since they were last hashed are not read again.

    Args:
        manifest: The manifest.
        weights: Whether to check the weights, too; not needed to read the tokenizer alone.

    Raises:
        UserError: A file changed, is missing, or was added; the message names it.
    """
    folder = manifest.directory
    advice = "restore it, or fetch the model again under another name"
    if manifest.identity != identity_of(manifest.files, manifest.weights_sha256):
        raise UserError(
            f"{FIELD}: the manifest of '{manifest.model}' was edited (its hashes do not agree): "
            f"{AGAIN}"
        )
    if not folder.is_dir():
        raise UserError(f"{FIELD}: no such folder: {folder}: {AGAIN}")
    present = model_files(folder)
    if missing := sorted(set(manifest.files) - set(present)):
        raise UserError(f"{FIELD}: {folder / missing[0]} is missing: {advice}")
    if added := sorted(set(present) - set(manifest.files)):
        raise UserError(
            f"{FIELD}: {folder / added[0]} was added after fetch-model, and loading would read "
            "it: remove it, or fetch the model again under another name"
        )
    hashes = FileHashes(folder, FIELD)
    heavy = weight_files(present)
    whole, found = hashes.of_all(heavy) if weights else (manifest.weights_sha256, {})
    found |= {name: hashes.of(name) for name in present if name not in heavy}
    for name, digest in sorted(found.items()):
        if digest != manifest.files[name]:
            raise UserError(
                f"{FIELD}: {folder / name} changed after fetch-model (sha256 {digest[:12]}, "
                f"was {manifest.files[name][:12]}): {advice}"
            )
    if whole != manifest.weights_sha256:
        raise UserError(f"{FIELD}: weights_sha256 of '{manifest.model}' was edited: {AGAIN}")
    hashes.remember()
