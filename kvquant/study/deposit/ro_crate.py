"""RO-Crate metadata of an archive (https://w3id.org/ro/crate/1.1), as JSON-LD."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from kvquant.formats.files import json_text
from kvquant.study.archive import Archive
from kvquant.study.config import Study
from kvquant.study.deposit.citation import Citation
from kvquant.study.deposit.contents import RECORDS, media_type
from kvquant.study.deposit.metadata import description_of, devices_of, title_of

NAME = "ro-crate-metadata.json"
PROFILE = "https://w3id.org/ro/crate/1.1"
# The crate's context has no `sha256`, which schema.org has since.
CONTEXT: list[Any] = [f"{PROFILE}/context", {"sha256": "https://schema.org/sha256"}]
PAPER = "https://arxiv.org/abs/2401.18079"
SOFTWARE, MEASURING = "#kvquant", "#measuring"
Entity = dict[str, Any]


def _ref(identifier: str) -> Entity:
    return {"@id": identifier}


def _described(path: str) -> str:
    """Returns what a file is."""
    if path.startswith(f"{RECORDS}/quantizers/"):
        return "Quantizer that records were measured with"
    if path.startswith(f"{RECORDS}/") and not path.endswith("SHA256SUMS"):
        return "Published records, each of which checks itself by its seal"
    told = {
        "study.json": "The study: what was measured and how results are compared",
        "requirements.lock": "Every package with version and hash",
        "sbom.json": "Bill of materials (CycloneDX)",
        "README.md": "What the files are, and how they are checked and used",
        "CITATION.cff": "How the software is cited",
        "LICENSE": "The licence",
        ".zenodo.json": "Metadata of the deposit",
    }
    if path.endswith("SHA256SUMS"):
        return "Hashes of the files in this folder and below"
    return told.get(path, "Environment of the software")


def _file(path: str, content: bytes) -> Entity:
    return {
        "@id": path,
        "@type": "File",
        "name": path,
        "description": _described(path),
        "encodingFormat": media_type(path),
        "contentSize": str(len(content)),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _measuring(records: Archive, paths: list[str]) -> Entity:
    """Returns the action that made the records, with the devices that it ran on."""
    devices = devices_of(records)
    made = [p for p in paths if p.startswith(f"{RECORDS}/") and p.endswith(".jsonl")]
    return {
        "@id": MEASURING,
        "@type": "CreateAction",
        "name": "Measuring the study",
        "description": f"On {', '.join(devices) or 'a processor'}; each record names its own.",
        "instrument": _ref(SOFTWARE),
        "object": _ref("study.json"),
        "result": [_ref(path) for path in made],
    }


def ro_crate(study: Study, records: Archive, citation: Citation, files: Mapping[str, bytes]) -> str:
    """Returns `ro-crate-metadata.json`.

    Args:
        study: The study.
        records: Its published records.
        citation: How the software is cited.
        files: The content of every other file of the archive by its path.
    """
    paths = sorted(files)
    licence = f"https://spdx.org/licenses/{citation.license}"
    authors = [
        {"@id": f"#author-{number}", "@type": "Person" if "," in name else "Organization",
         "name": name}
        for number, name in enumerate(citation.authors, start=1)
    ]  # fmt: skip
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": title_of(study),
        "description": description_of(study, records),
        "datePublished": citation.date,
        "version": citation.version,
        "license": _ref(licence),
        "author": [_ref(author["@id"]) for author in authors],
        "keywords": ", ".join(citation.keywords),
        "citation": _ref(PAPER),
        "mentions": _ref(MEASURING),
        "hasPart": [_ref(path) for path in paths],
    }
    graph = [
        {
            "@id": NAME,
            "@type": "CreativeWork",
            "conformsTo": _ref(PROFILE),
            "about": _ref("./"),
        },
        root,
        *authors,
        {"@id": licence, "@type": "CreativeWork", "name": citation.license},
        {
            "@id": PAPER,
            "@type": "ScholarlyArticle",
            "name": "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache "
            "Quantization",
        },
        {
            "@id": SOFTWARE,
            "@type": "SoftwareApplication",
            "name": citation.title,
            "version": citation.version,
            "license": _ref(licence),
        },
        _measuring(records, paths),
        *(_file(path, files[path]) for path in paths),
    ]
    return json_text({"@context": CONTEXT, "@graph": graph})
