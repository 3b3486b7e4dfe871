"""The files of an archive: published records, quantizers, the study, and what it ran in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvquant.errors import UserError
from kvquant.formats.files import read_bytes
from kvquant.study.archive import CURVES, SUMS
from kvquant.study.config import Study
from kvquant.study.deposit.citation import NAME as CITATION
from kvquant.study.published_quantizers import FOLDER, MANIFEST, TENSORS

REPOSITORY = ("LICENSE", CITATION, "requirements.lock")
ENVIRONMENTS = "envs"
RECORDS = "published"  # folder of the records in the archive
AGAIN = "take it from version control again"


def record_files(archive: Path) -> list[Path]:
    """Returns the files of verified records and quantizers, and no other, below their folder.

    Args:
        archive: The study's folder of published records, which was verified.
    """
    lines = (archive / SUMS).read_text(encoding="utf-8").splitlines()
    named = [archive / line.partition("  ")[2] for line in lines]
    quantizers = (f for name in (MANIFEST, TENSORS) for f in (archive / FOLDER).rglob(name))
    return sorted([archive / SUMS, *named, *quantizers])


def study_text(study: Study) -> str:
    """Returns the study as a file that belongs to no machine.

    Its folder of records is that of the archive. A folder of local data is left out, and so are
    companions, which are other studies.
    """
    left: dict[str, Any] = {"data_dir": None, "reproduce": None, "companions": {}}
    plain = study.model_copy(update={"published": RECORDS, **left})
    return plain.model_dump_json(indent=2) + "\n"


def contents(
    study: Study, archive: Path, repository: Path, sbom: Path | None = None
) -> dict[str, bytes]:
    """Returns the content of every file by its path in the archive, without metadata.

    Args:
        study: The study.
        archive: Its folder of published records, which was verified.
        repository: Folder with licence, citation, lock and environments.
        sbom: A bill of materials.

    Raises:
        UserError: A file is missing.
    """
    found = {
        f"{RECORDS}/{file.relative_to(archive).as_posix()}": read_bytes(file, "--archive", AGAIN)
        for file in record_files(archive)
    }
    found["study.json"] = study_text(study).encode()
    for name in REPOSITORY:
        found[name] = read_bytes(repository / name, "--repository", AGAIN)
    environments = [f for f in sorted((repository / ENVIRONMENTS).glob("*")) if f.is_file()]
    if not environments:
        raise UserError(f"--repository: no environments below {repository / ENVIRONMENTS}")
    for file in environments:
        found[f"{ENVIRONMENTS}/{file.name}"] = read_bytes(file, "--repository", AGAIN)
    if sbom is not None:
        found["sbom.json"] = _bill(sbom)
    return found


def _bill(file: Path) -> bytes:
    """Returns a bill of materials that is one.

    Raises:
        UserError: It is no CycloneDX document.
    """
    raw = read_bytes(file, "--sbom")
    try:
        told = json.loads(raw)
    except ValueError:
        told = None
    if not isinstance(told, dict) or told.get("bomFormat") != "CycloneDX":
        raise UserError(
            f"--sbom: {file}: is no CycloneDX document: "
            "`uv export --all-groups --all-extras --format cyclonedx1.5` writes one"
        )
    return raw


def media_type(path: str) -> str:
    """Returns the media type of a file of the archive by its name."""
    types = {
        ".jsonl": "application/jsonl",
        ".json": "application/json",
        CURVES: "text/csv",
        ".yaml": "application/yaml",
        ".cff": "application/yaml",
        ".md": "text/markdown",
        ".safetensors": "application/octet-stream",
    }
    return types.get(Path(path).suffix, "text/plain")
