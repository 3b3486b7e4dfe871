"""Quantizers that lie beside the published records that were measured with them.

Calibrations of two machines differ in the last bits, and records of one scheme must name one
quantizer. With its quantizer published, a study can be continued on any machine: the workflow takes
the published files instead of calibrating. `quantizers/MODEL/SCHEME/quantizer.json` and
`quantizer.safetensors` check themselves by a seal and a hash. Large ones are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, printable
from kvquant.formats.files import parse_json, read_text, replace, sha256_file
from kvquant.formats.sealing import check_seal
from kvquant.study.archive import RESTORE, Published

FOLDER, MANIFEST, TENSORS = "quantizers", "quantizer.json", "quantizer.safetensors"
MAX_BYTES = 1 << 20  # of the tensors; a repository keeps every version of a file
AGAIN = "build it again (`kvquant quantize`)"


def _content(file: Path, field: str = "published", again: str = RESTORE) -> dict[str, Any]:
    """Returns a whole manifest of a quantizer whose tensors are those that it names.

    Args:
        file: The manifest.
        field: What it is, for messages.
        again: How the user gets it again, for messages.

    Raises:
        UserError: It is damaged or was edited, or its tensors are others.
    """
    text = read_text(file, field, again)
    tensors = file.with_name(TENSORS)
    try:
        found = parse_json(text)
        if not isinstance(found, dict):
            raise ValueError("is no quantizer")
        check_seal(found)
        if not tensors.is_file():
            raise ValueError(f"{TENSORS} beside it is missing")
        if sha256_file(tensors) != found.get("tensors_sha256"):
            raise ValueError(f"{TENSORS} beside it holds other tensors")
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: {printable(error)}: {again}") from None
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


def new_quantizers(results: Path, archive: Path, records: Iterable[Published]) -> dict[str, Path]:
    """Returns the quantizers in a results folder that are to be published with records.

    Args:
        results: The study's results folder.
        archive: Its folder of published records.
        records: All published records, and those that are to be published.

    Returns:
        The manifests of those that records were measured with, by MODEL/SCHEME.

    Raises:
        UserError: One is damaged.
    """
    found: dict[str, Path] = {}
    for model, scheme, digest in sorted({named[:3] for named in _named(records)}):
        file = results / "models" / model / scheme / MANIFEST
        if (archive / FOLDER / model / scheme / MANIFEST).exists() or not file.exists():
            continue
        content = _content(file, "quantizer", AGAIN)
        small = file.with_name(TENSORS).stat().st_size <= MAX_BYTES
        if content["tensors_sha256"] == digest and small:
            found[f"{model}/{scheme}"] = file
    return found


def add_quantizers(results: Path, archive: Path, records: Iterable[Published]) -> list[str]:
    """Publishes the quantizers in a results folder that records were measured with.

    Args:
        results: See :func:`new_quantizers`.
        archive: See :func:`new_quantizers`.
        records: See :func:`new_quantizers`.

    Returns:
        The names of those that are published now, as MODEL/SCHEME.

    Raises:
        UserError: One is damaged, or cannot be written.
    """
    found = new_quantizers(results, archive, records)
    for name, file in found.items():
        to = archive / FOLDER / name / MANIFEST
        for target in (to.with_name(TENSORS), to):  # without its manifest there is no quantizer
            replace(target, file.with_name(target.name).read_bytes())
    return list(found)


def lost_manifests(archive: Path) -> list[str]:
    """Returns what is wrong with tensors whose manifest is gone.

    The workflow would take them for no published quantizer, and calibrate. Publishing the results
    once more, as after it was interrupted, writes the manifest again.
    """
    return [
        f"{file}: has no {MANIFEST} beside it: take that from version control, or publish the "
        "results again"
        for file in sorted((archive / FOLDER).glob(f"*/*/{TENSORS}"))
        if not file.with_name(MANIFEST).exists()
    ]


def quantizer_problems(archive: Path, records: Iterable[Published]) -> list[str]:
    """Returns what is wrong with published quantizers: damage, and records of other ones.

    Without a published quantizer, as large ones are left out, records of one scheme name one all
    the same. Those that name the same other one have one line in common.
    """
    found: dict[tuple[str, str], tuple[str, str]] = {}  # the hash, and whose it is
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
        found[names] = str(content["tensors_sha256"]), f"published quantizer of '{names[1]}'"
    others: dict[tuple[str, str, str], list[Published]] = {}
    for model, scheme, digest, record in _named(records):
        mine = digest, f"quantizer of {record.where}"
        if found.setdefault((model, scheme), mine)[0] != digest:
            others.setdefault((model, scheme, digest), []).append(record)
    for (model, scheme, digest), wrong in others.items():
        theirs, whose = found[model, scheme]
        more = f", and {len(wrong) - 1} more records" if len(wrong) > 1 else ""
        problems.append(
            f"{wrong[0].where}: field 'inputs.quantizer': is not the {whose} "
            f"({printable(digest[:12])}, not {printable(theirs[:12])}){more}: measure again with "
            "that one"
        )
    return problems
