"""What CITATION.cff says, which the metadata of an archive repeats."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvquant.errors import UserError
from kvquant.study.study_file import read_mapping

NAME = "CITATION.cff"
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Citation:
    """How the software is cited.

    Attributes:
        title: Its title.
        version: Its version.
        license: SPDX identifier of its licence.
        date: Day of the release, as YYYY-MM-DD.
        authors: Names of authors, as they are written.
        keywords: Keywords.
    """

    title: str
    version: str
    license: str
    date: str
    authors: tuple[str, ...]
    keywords: tuple[str, ...]


def _author(entry: object) -> str:
    """Returns the name of a person (family name first) or of an entity."""
    if isinstance(entry, dict):
        if "name" in entry:
            return str(entry["name"])
        if "family-names" in entry:
            names = (str(entry[k]) for k in ("family-names", "given-names") if k in entry)
            return ", ".join(names)
    raise UserError(f"{NAME}: authors: an entry has neither `name` nor `family-names`")


def read_citation(repository: Path) -> Citation:
    """Reads CITATION.cff of a repository.

    Raises:
        UserError: It is missing, no YAML, or lacks a field that an archive needs.
    """
    raw = read_mapping(repository / NAME, "--repository")
    fields = raw if isinstance(raw, dict) else {}
    for field in ("title", "version", "license", "date-released", "authors"):
        if not fields.get(field):
            raise UserError(f"{repository / NAME}: {field}: is missing, which an archive needs")
    date = str(fields["date-released"])
    if not _DATE.fullmatch(date):
        raise UserError(f"{repository / NAME}: date-released: must be YYYY-MM-DD, got '{date}'")
    return Citation(
        title=str(fields["title"]),
        version=str(fields["version"]),
        license=str(fields["license"]),
        date=date,
        authors=tuple(map(_author, fields["authors"])),
        keywords=tuple(map(str, fields.get("keywords", []))),
    )
