"""On which devices and with which versions a study was measured, and the hash of its records."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvquant.analysis.sources import Sources
from kvquant.formats.files import parse_json, read_text
from kvquant.formats.sealing import SEAL
from kvquant.study.config import Study
from kvquant.study.records import AGAIN
from kvquant.study.seal import KINDS

# What a record of each kind is called where records are counted.
WORDS = {
    "eval": "evaluations",
    "throughput": "throughput jobs",
    "energy": "energy jobs",
    "jobs": "cases of whole jobs",
    "kernels": "kernel cases",
    "append": "append jobs",
}
PACKAGES = {"torch": "PyTorch", "triton": "Triton", "transformers": "transformers"}
COMMIT = 12  # letters of a commit's name


@dataclass
class Device:
    """What was measured on one kind of device, and with what.

    Attributes:
        name: GPUs of the machine, or that there was none.
        records: Number of records by kind, for readers.
        drivers: Versions of the GPU driver.
        versions: Versions of Python and of packages, by name.
        commits: Number of records by commit of the code.
        changed: Records whose code had uncommitted changes.
    """

    name: str
    records: Counter[str] = field(default_factory=Counter)
    drivers: set[str] = field(default_factory=set)
    versions: dict[str, set[str]] = field(default_factory=dict)
    commits: Counter[str] = field(default_factory=Counter)
    changed: int = 0

    def add(self, content: Mapping[str, Any]) -> None:
        """Counts one record."""
        environment = content["environment"]
        self.records[WORDS[str(content["kind"])]] += 1
        self.drivers |= {str(g["driver"]) for g in environment.get("gpus", []) if g.get("driver")}
        packages = environment.get("packages", {})
        found = {"Python": environment.get("python")}
        found |= {label: packages.get(name) for name, label in PACKAGES.items()}
        for label, version in found.items():
            if version:
                self.versions.setdefault(label, set()).add(str(version))
        self.commits[str(environment.get("commit") or "unknown")[:COMMIT]] += 1
        self.changed += bool(environment.get("dirty"))


def contents(study: Study, results: Path, device: str) -> Iterator[Mapping[str, Any]]:
    """Yields every record of a study that there is, published ones included.

    They were verified when they were collected; here their environments and seals are read.

    Args:
        study: The study, which says which records there are.
        results: The study's folder of results.
        device: The device in the paths of timed records.
    """
    sources = Sources(study, results, device)
    for stage in KINDS:
        for cell in sources.cells(stage):
            source = sources.find(cell)
            if source.published is not None:
                yield source.published.content
            elif source.there:
                yield parse_json(read_text(source.file, "record", AGAIN))


def _name(environment: Mapping[str, Any]) -> str:
    """Returns the names of a machine's GPUs, or its system where it has none."""
    if "gpus" not in environment:
        return "machine not recorded"
    gpus = dict.fromkeys(str(g["name"]).removeprefix("NVIDIA ") for g in environment["gpus"])
    return " and ".join(gpus) or f"processor without GPU ({environment.get('system', 'unknown')})"


def devices(records: Iterable[Mapping[str, Any]]) -> list[Device]:
    """Returns what was measured on each device, the device with the most records first."""
    found: dict[str, Device] = {}
    for content in records:
        name = _name(content["environment"])
        found.setdefault(name, Device(name)).add(content)
    return sorted(found.values(), key=lambda device: -device.records.total())


def digest(records: Iterable[Mapping[str, Any]]) -> str:
    """Returns the sha256 of all records' seals, sorted, a line each; empty without records.

    A seal is a hash over all that a record holds, so that any changed, added or missing record
    gives another hash.
    """
    seals = sorted(str(content[SEAL]) for content in records)
    return hashlib.sha256("".join(f"{s}\n" for s in seals).encode()).hexdigest() if seals else ""
