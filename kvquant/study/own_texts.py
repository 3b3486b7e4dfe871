"""The study's section `datasets:`, the user's own texts and prompts as local files.

A result depends on what the files hold, not on their names: their hashes are part of the digests of
everything that is made of them. Where a study gives no hashes, they are read from the files when
the study is read, and every job of a run reads the same study.json with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from kvquant.errors import UserError
from kvquant.formats.files import expand_home, sha256_file
from kvquant.study.limits import MAX_NAMES
from kvquant.study.models import Sha256
from kvquant.study.strict import Strict


class OwnText(Strict):
    """Local files that are one data set: a text, or the prompts of tasks of suite `prompts`."""

    files: list[str] = Field(
        min_length=1,
        max_length=MAX_NAMES,
        description="UTF-8 files, joined in this order; relative paths start at the folder in "
        "which the workflow runs, as all paths of a study",
    )
    test_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="share of the text, at its end, that tasks read; calibration reads the rest, "
        "so that they never share text; 1: no calibration. Of no meaning for prompts",
    )
    sha256: list[Sha256] | None = Field(
        None,
        description="sha256 of each file: an edited file is refused; absent: taken from the files, "
        "and what depends on an edited one is measured again",
    )

    @model_validator(mode="after")
    def _complete(self) -> OwnText:
        if len(set(self.files)) < len(self.files):
            raise ValueError("files: one is given twice")
        if any(not name.strip() or not name.isprintable() for name in self.files):
            raise ValueError("files: must be names of files, on one line each")
        if self.sha256 is not None and len(self.sha256) != len(self.files):
            raise ValueError(f"sha256: needs one per file, {len(self.files)}")
        return self

    def identity(self) -> dict[str, Any]:
        """Returns what results depend on: the content of the files and where the test part begins.

        Raises:
            UserError: The study was not read by :func:`kvquant.study.config.parse_study`.
        """
        if self.sha256 is None:
            raise UserError("datasets: the hashes of the files are not known yet")
        return {"sha256": self.sha256, "test_share": self.test_share}


def _sha256(name: str, field: str) -> str:
    """Returns the hash of a file of a data set."""
    file = expand_home(name, field)
    if not file.is_file():
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise UserError(
            f"{field}: no such file{where}: {name} (relative paths start at the folder in which "
            "the command runs)"
        )
    try:
        return sha256_file(file)
    except OSError as error:
        raise UserError(f"{field}: {name} cannot be read ({error.strerror})") from None


def with_hashes(datasets: Mapping[str, OwnText]) -> dict[str, OwnText]:
    """Returns data sets with the hashes of their files, where a study gives none.

    Raises:
        UserError: A file is missing or cannot be read.
    """
    found = {}
    for key, own in datasets.items():
        if own.sha256 is None:
            hashes = [_sha256(name, f"datasets.{key}.files") for name in own.files]
            own = own.model_copy(update={"sha256": hashes})
        found[key] = own
    return found


def refuse_edited(datasets: Mapping[str, OwnText]) -> None:
    """Refuses files that are not those of the hashes that the study gives.

    Raises:
        UserError: A file is missing or was edited; the message names it.
    """
    for key, own in datasets.items():
        for name, expected in zip(own.files, own.sha256 or (), strict=True):
            now = _sha256(name, f"datasets.{key}.files")
            if now != expected:
                raise UserError(
                    f"datasets.{key}.sha256: {name} was edited (its sha256 is {now}, the study "
                    f"says {expected[:12]}...): restore it, or write the new hash, and what "
                    "depends on it is measured again"
                )


def is_read(own: OwnText, manifest: str) -> bool:
    """Returns whether a manifest of what was read is of the files as they are now.

    Args:
        own: The data set with the hashes of now.
        manifest: The manifest; a missing or damaged one is of no files.
    """
    try:
        found = json.loads(Path(manifest).read_text(encoding="utf-8"))["own"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(found == own.identity())


def edited_since(datasets: Mapping[str, OwnText], study_json: Path) -> Iterator[str]:
    """Yields a line per file that was edited since the last run, which wrote a study.json.

    Args:
        datasets: The data sets with the hashes of now.
        study_json: The study of the last run; a missing or damaged one tells nothing.
    """
    try:
        before = json.loads(study_json.read_text(encoding="utf-8"))["datasets"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for key, own in datasets.items():
        old: Any = before.get(key) if isinstance(before, dict) else None
        try:
            held = dict(zip(old["files"], old["sha256"], strict=True))
        except (TypeError, KeyError, ValueError):
            continue
        for name, now in zip(own.files, own.sha256 or (), strict=True):
            if held.get(name, now) != now:
                yield (
                    f"datasets.{key}: {name} was edited since the last run: what depends on it is "
                    "measured again"
                )
