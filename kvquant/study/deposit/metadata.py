"""The metadata of an archive: Zenodo's form, and a page for its readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvquant.formats.files import json_text
from kvquant.study.archive import Archive
from kvquant.study.config import Study
from kvquant.study.deposit.citation import Citation

KVQUANT_PAPER = "arXiv:2401.18079"  # whose procedure the study extends


def title_of(study: Study) -> str:
    """Returns the title of the archive."""
    return f"{study.title or study.study}: measurements"


def devices_of(records: Archive) -> list[str]:
    """Returns the names of all GPUs in published records; a processor has none."""
    found: set[str] = set()
    for record in records.values():
        where = record.content.get("environment")
        gpus = where.get("gpus") if isinstance(where, Mapping) else None
        found |= {str(gpu.get("name")) for gpu in gpus or []}
    return sorted(found)


def description_of(study: Study, records: Archive) -> str:
    """Returns what the archive holds, in two sentences."""
    devices = devices_of(records)
    on = f", measured on {', '.join(devices)}" if devices else ""
    return (
        f"{len(records):,} records of the study '{study.study}' of KV-cache quantization{on}, with "
        "the quantizers that they were measured with, the study file and the environments. Each "
        "record holds a seal over its content, and SHA256SUMS has the hash of every file."
    )


def zenodo(study: Study, records: Archive, citation: Citation) -> str:
    """Returns `.zenodo.json`, the metadata of a deposit."""
    fields: dict[str, Any] = {
        "title": title_of(study),
        "upload_type": "dataset",
        "description": description_of(study, records),
        "creators": [{"name": name} for name in citation.authors],
        "publication_date": citation.date,
        "version": citation.version,
        "license": citation.license,
        "access_right": "open",
        "keywords": list(citation.keywords),
        "related_identifiers": [
            {"identifier": KVQUANT_PAPER, "relation": "references", "scheme": "arxiv"}
        ],
    }
    return json_text(fields)


def read_me(study: Study, records: Archive, names: Iterable[str]) -> str:
    """Returns README.md, which says what the files are and how they are checked and used.

    Args:
        study: The study.
        records: Its published records.
        names: The paths of the other files.
    """
    bill = "| `sbom.json` | bill of materials (CycloneDX) |\n" if "sbom.json" in names else ""
    return f"""# {title_of(study)}

{description_of(study, records)}

| file | what it is |
|---|---|
| `published/` | records, a file per model and scheme or per device, and `quantizers/` |
| `study.json` | the study: what was measured, and how results are compared |
| `requirements.lock`, `envs/` | the software, with every version and hash |
{bill}| `SHA256SUMS` | the hash of every other file |
| `ro-crate-metadata.json`, `.zenodo.json` | metadata for machines |
| `CITATION.cff`, `LICENSE` | how to cite, and the licence |

Check every file:

    sha256sum -c SHA256SUMS

In a clone of the software, with FOLDER as this folder, verify every record, make the tables and
figures again, or measure and compare:

    kvquant publish --archive FOLDER/published
    snakemake -c2 --configfile FOLDER/study.json --replace-workflow-config \\
        --config published=FOLDER/published
    snakemake -c2 --configfile FOLDER/study.json --replace-workflow-config \\
        --config published=FOLDER/published reproduce=true -- reproduce
"""
