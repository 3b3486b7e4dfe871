"""The other published studies of which a study's paper speaks (key `companions`)."""

from __future__ import annotations

from pathlib import Path

from kvquant.errors import UserError
from kvquant.study.archive import SUMS
from kvquant.study.config import Study
from kvquant.study.overlay import read_study


def published_sums(file: str) -> list[str]:
    """Returns the file of hashes of a companion's published records; none before they are there.

    It changes with any of them.

    Args:
        file: The companion's study file.

    Raises:
        UserError: The study cannot be read, or names no published records.
    """
    raw = read_study(file, "companions")
    published = raw.get("published") if isinstance(raw, dict) else None
    if not published:
        raise UserError(f"companions: {file}: has no published records (key `published`)")
    sums = Path(str(published)) / SUMS
    return [str(sums)] if sums.is_file() else []


def companion_files(study: Study) -> list[str]:
    """Returns the files of a study's companions and of the hashes of their published records.

    Raises:
        UserError: As :func:`published_sums`.
    """
    files = study.companions.values()
    return [name for file in files for name in (file, *published_sums(file))]
