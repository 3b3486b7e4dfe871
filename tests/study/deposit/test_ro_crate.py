"""The RO-Crate metadata of an archive has the structure that RO-Crate 1.1 asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvquant.study.config import Study
from kvquant.study.deposit.verb import complete

NAME = "ro-crate-metadata.json"


def references(value: Any) -> Iterator[str]:
    """The identifiers that a property refers to."""
    if isinstance(value, dict):
        assert set(value) == {"@id"}, "properties are flat: an entity stands in the graph"
        yield value["@id"]
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


def test_the_structure(study: Study, repository: Path, tmp_path: Path) -> None:
    files = complete(study, tmp_path / "published", repository)
    crate = json.loads(files[NAME])
    assert crate["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    entities = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(entities) == len(crate["@graph"]), "an identifier is given twice"
    assert all(entity["@type"] for entity in entities.values())
    descriptor, root = entities[NAME], entities["./"]
    assert descriptor["@type"] == "CreativeWork" and descriptor["about"] == {"@id": "./"}
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert root["@type"] == "Dataset" and root["datePublished"] == "2026-01-02"
    assert root["name"] == "A study: measurements" and "35 records" in root["description"]
    outside = {"https://w3id.org/ro/crate/1.1"}
    for entity in entities.values():
        for name, value in entity.items():
            if not name.startswith("@"):
                assert set(references(value)) <= entities.keys() | outside, (entity["@id"], name)
    license_, authors = entities[root["license"]["@id"]], root["author"]
    assert license_["@id"] == "https://spdx.org/licenses/Apache-2.0" and license_["name"]
    people = [(entities[a["@id"]]["@type"], entities[a["@id"]]["name"]) for a in authors]
    assert people == [("Person", "Curie, Maria"), ("Organization", "A group")]


def test_every_file_is_a_part_with_its_size_and_hash(
    study: Study, repository: Path, tmp_path: Path
) -> None:
    files = complete(study, tmp_path / "published", repository)
    graph = json.loads(files[NAME])["@graph"]
    root = next(entity for entity in graph if entity["@id"] == "./")
    parts = {part["@id"] for part in root["hasPart"]}
    # the descriptor is no part of its crate, and the hashes are made last
    assert parts == files.keys() - {NAME, "SHA256SUMS"}
    for entity in graph:
        if entity["@type"] == "File":
            content = files[entity["@id"]]
            assert entity["contentSize"] == str(len(content))
            assert entity["sha256"] == hashlib.sha256(content).hexdigest()
            assert entity["encodingFormat"] and entity["description"]
    made = next(entity for entity in graph if entity["@type"] == "CreateAction")
    assert {"@id": "published/eval/tiny/fp16.jsonl"} in made["result"]
