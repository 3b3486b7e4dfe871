"""Quantizers that lie beside the published records that were measured with them.

Calibrations of two machines differ in the last bits, and records of one scheme must name one
quantizer. With its quantizer published, a study can be continued on any machine: the workflow takes
the published files instead of calibrating. `quantizers/MODEL/SCHEME/quantizer.json` and
`quantizer.safetensors` check themselves by a seal and a hash. Large ones are left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, printable
from kvquant.formats.files import parse_json, read_text, sha256_file
from kvquant.formats.sealing import check_seal
from kvquant.study.archive import RESTORE, Published

FOLDER, MANIFEST, TENSORS = "quantizers", "quantizer.json", "quantizer.safetensors"
MAX_BYTES = 1 << 20  # of the tensors; a repository keeps every version of a file


def _content(file: Path) -> dict[str, Any]:
    """Returns a whole manifest of a quantizer whose tensors are those that it names.

    Raises:
        UserError: It is damaged or was edited, or its tensors are others.
    """
    text = read_text(file, "published", RESTORE)
    try:
        found = parse_json(text)
        if not isinstance(found, dict):
            raise ValueError("is no quantizer")
        check_seal(found)
        if sha256_file(file.with_name(TENSORS)) != found.get("tensors_sha256"):
            raise ValueError(f"{TENSORS} beside it holds other tensors")
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: {printable(error)}: {RESTORE}") from None
    return found


def published_quantizer(
    archive: str | Path | None, model: str, scheme: str, digest: str
) -> Path | None:
    """Returns the published quantizer of a scheme, or None where there is none of its digest.

    Args:
        archive: The study's folder of published records, if it has one.
        model: Name of the model.
        scheme: Name of the scheme.
        digest: Of what the study builds the quantizer from.

    Raises:
        UserError: It is damaged or was edited.
    """
    if archive is None:
        return None
    file = Path(archive) / FOLDER / model / scheme / MANIFEST
    if not file.is_file():
        return None
    return file if _content(file).get("spec_digest") == digest else None


def _named(records: Iterable[Published]) -> Iterator[tuple[str, str, str, Published]]:
    """Yields model, scheme and hash of the quantizer of each record that names one."""
    for record in records:
        inputs = record.content.get("inputs")
        if isinstance(inputs, dict) and "quantizer" in inputs:
            model, scheme = (str(record.content.get(name)) for name in ("model", "scheme"))
            yield model, scheme, str(inputs["quantizer"]), record


def add_quantizers(results: Path, archive: Path, records: Iterable[Published]) -> list[str]:
    """Publishes the quantizers in a results folder that records were measured with.

    Args:
        results: The study's results folder.
        archive: Its folder of published records.
        records: All published records.

    Returns:
        The names of those that are published now, as MODEL/SCHEME.

    Raises:
        UserError: One is damaged.
    """
    added: list[str] = []
    for model, scheme, digest, _ in _named(records):
        file = results / "models" / model / scheme / MANIFEST
        to = archive / FOLDER / model / scheme / MANIFEST
        if to.exists() or not file.exists():
            continue
        tensors = file.with_name(TENSORS)
        if _content(file)["tensors_sha256"] != digest or tensors.stat().st_size > MAX_BYTES:
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tensors, to.with_name(TENSORS))
        shutil.copyfile(file, to)
        added.append(f"{model}/{scheme}")
    return added


def quantizer_problems(archive: Path, records: Iterable[Published]) -> list[str]:
    """Returns what is wrong with published quantizers: damage, and records of other ones."""
    found: dict[tuple[str, str], str] = {}
    problems: list[str] = []
    for file in sorted((archive / FOLDER).glob(f"*/*/{MANIFEST}")):
        try:
            content = _content(file)
        except UserError as error:
            problems.append(str(error))
            continue
        names = (file.parts[-3], file.parts[-2])
        if names != (content.get("model"), content.get("scheme")):
            problems.append(f"{file}: is the quantizer of another model or scheme: {RESTORE}")
        found[names] = str(content["tensors_sha256"])
    for model, scheme, digest, record in _named(records):
        if (theirs := found.get((model, scheme), digest)) != digest:
            problems.append(
                f"{record.where}: field 'inputs.quantizer': is not the published quantizer of "
                f"'{scheme}' ({printable(digest[:12])}, not {theirs[:12]}): measure it again with "
                "that one"
            )
    return problems
