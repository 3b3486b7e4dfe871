"""`kvquant archive`: packs the published records of a study with all that explains them.

The same records, study and repository give the same bytes: entries are sorted, have one time and
are stored without compression, whose output differs between libraries. So the hash of the file
identifies it.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from kvquant.errors import UserError
from kvquant.formats.files import replace, sha256_file
from kvquant.study.archive import SUMS, Archive, read_archive
from kvquant.study.cells import STAGES, cells_of
from kvquant.study.config import Study, load_study
from kvquant.study.deposit.citation import read_citation
from kvquant.study.deposit.contents import contents
from kvquant.study.deposit.metadata import read_me, zenodo
from kvquant.study.deposit.ro_crate import NAME, ro_crate
from kvquant.study.plan import published_places
from kvquant.study.publish import verify

EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip file can hold
MODE = 0o100644 << 16


def packed(files: Mapping[str, bytes], folder: str) -> bytes:
    """Returns a zip file of these files below one folder; the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{folder}/{name}", EARLIEST)
            entry.external_attr = MODE
            entry.create_system = 3  # Unix, wherever it is written
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def _verified(study: Study, archive: Path) -> Archive:
    """Returns the published records, verified in full and against the study.

    Raises:
        UserError: A record or quantizer was edited, or is of another configuration.
    """
    verify(archive)
    records = read_archive(archive)
    devices = {str(r.content.get("device", study.device)) for r in records.values()}
    for device in sorted(devices):
        published_places(records, (c for s in STAGES for c in cells_of(study, s, device)))
    return records


def complete(
    study: Study, archive: Path, repository: Path, sbom: Path | None = None
) -> dict[str, bytes]:
    """Returns every file of the archive by its path, metadata and hashes included.

    Args:
        study: The study.
        archive: Its folder of published records.
        repository: Folder with licence, citation, lock and environments.
        sbom: A bill of materials.

    Raises:
        UserError: A record is not as it was measured, or a file is missing.
    """
    records, citation = _verified(study, archive), read_citation(repository)
    files = contents(study, archive, repository, sbom)
    files["README.md"] = read_me(study, records, files).encode()
    files[".zenodo.json"] = zenodo(study, records, citation).encode()
    files[NAME] = ro_crate(study, records, citation, files).encode()
    lines = (f"{sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return files | {SUMS: "".join(lines).encode()}


def run(args: argparse.Namespace) -> None:
    """Writes the archive and prints its hash."""
    study = load_study(args.study)
    compared = study.reproduce.published if study.reproduce is not None else None
    archive = args.archive or study.published or compared
    if archive is None:
        raise UserError("--archive: the study names no published records: name their folder")
    if args.out.suffix != ".zip":
        raise UserError(f"--out: {args.out}: must end with .zip")
    files = complete(study, Path(archive), args.repository, args.sbom)
    replace(args.out, packed(files, f"kvquant-{study.study}"))
    print(f"archive: {args.out}: {len(files):,} files, sha256 {sha256_file(args.out)}")
