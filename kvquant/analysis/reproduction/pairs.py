"""Pairs of records: what was measured again, and what is published, both verified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, printable
from kvquant.formats.files import read_json
from kvquant.study.archive import MOST, RESTORE, Archive, Published, read_archive
from kvquant.study.cells import STAGES, cells_of
from kvquant.study.config import Study
from kvquant.study.measured_again import same_result, to_measure
from kvquant.study.places import names_in_place
from kvquant.study.publish import finished_record, verified_record
from kvquant.study.published_quantizers import FOLDER, MANIFEST
from kvquant.study.record_types import Record
from kvquant.study.seal import record_files

SAME, CALIBRATED = "the published one", "calibrated again"


@dataclass(frozen=True)
class Side:
    """A verified record on one side of the comparison.

    Attributes:
        record: The record.
        samples: Its samples; empty where its kind has none.
    """

    record: Record
    samples: list[dict[str, Any]]

    @property
    def device(self) -> str:
        """Returns the GPU by its name, or the system of a processor."""
        where = self.record.environment
        gpus = [str(gpu.get("name")) for gpu in where.get("gpus") or []]
        timed = getattr(self.record, "device", "cpu")  # the name in the path of what is timed
        other = f"processor ({where.get('system', 'unknown')})" if timed == "cpu" else str(timed)
        return ", ".join(dict.fromkeys(gpus)) or other

    @property
    def on_gpu(self) -> bool:
        """Returns whether the result was measured on a GPU."""
        return bool(self.record.environment.get("gpus"))

    @property
    def versions(self) -> str:
        """Returns the versions that a difference may come from, and the commit."""
        packages: Mapping[str, str] = self.record.environment.get("packages") or {}
        names = ("kvquant", "torch", "transformers")
        told = [f"{name} {packages[name]}" for name in names if name in packages]
        commit = self.record.environment.get("commit")
        return ", ".join([*told, f"commit {str(commit)[:8]}"] if commit else told)


@dataclass(frozen=True)
class Pair:
    """A result that is on both sides.

    Attributes:
        stage: The kind of the records.
        names: The fields that their place names.
        published: The published record.
        own: The one that was measured again.
        quantizer: How the quantizers relate ("the published one", ...); empty without one.
        whole: Whether every published seed of the task and scheme was measured again.
    """

    stage: str
    names: dict[str, Any]
    published: Side
    own: Side
    quantizer: str
    whole: bool = True


@dataclass(frozen=True)
class Missing:
    """A published result that was not measured again.

    Attributes:
        stage: The kind of its record.
        names: The fields that its place names.
        planned: Whether the study asks for it again.
    """

    stage: str
    names: dict[str, Any]
    planned: bool


@dataclass(frozen=True)
class Found:
    """What there is to compare.

    Attributes:
        pairs: Results on both sides.
        missing: Published results that were not measured again.
        alone: Places of own results of which nothing is published.
    """

    pairs: list[Pair]
    missing: list[Missing]
    alone: list[str]


def _own(results: Path) -> list[tuple[Path, Published]]:
    found, problems = [], []
    for file in record_files(results):
        try:
            found.append((file, finished_record(file, results)))
        except UserError as error:
            problems.append(str(error))
    _refuse(problems)
    return found


def _refuse(problems: list[str]) -> None:
    if problems:
        rest = len(problems) - MOST
        raise UserError("\n".join(problems[:MOST] + [f"and {rest} more"] * (rest > 0)))


def _nearest(candidates: list[Published], own: Published, study: Study) -> Published:
    """Returns the published record of the own device, else of the study's, else the first."""
    wanted = [own.content.get("device"), study.device]
    for device in wanted:
        for record in candidates:
            if record.content.get("device") == device:
                return record
    return candidates[0]


def _published_hash(archive: Path, own: Published) -> str | None:
    """Returns the hash of the published quantizer of a result's scheme, if there is one."""
    folder = archive / FOLDER / str(own.content.get("model")) / str(own.content.get("scheme"))
    if not (folder / MANIFEST).is_file():
        return None
    content = read_json(folder / MANIFEST, "published", RESTORE)
    return str(content.get("tensors_sha256")) if isinstance(content, dict) else None


def _quantizer(
    file: Path, own: Published, published: Published, kept: str | None, allowed: bool
) -> tuple[str, str | None]:
    """Returns how the quantizers of both sides relate, and why the result is refused.

    Args:
        file: The own record.
        own: Its content.
        published: The published record, of which older ones do not name their quantizer.
        kept: The hash of the published quantizer, if there is one.
        allowed: Whether another one is compared where one is published.
    """
    mine = own.content.get("inputs", {}).get("quantizer")
    theirs = published.content.get("inputs", {}).get("quantizer", kept)
    if mine is None:
        return "", None
    if theirs is None or mine == theirs:
        return (SAME if theirs is not None else CALIBRATED), None
    if kept is None or allowed:
        return CALIBRATED, None
    return "", (
        f"{file}: field 'inputs.quantizer': is another quantizer than the published one "
        f"({printable(mine[:12])}, not {printable(theirs[:12])}, {published.where}): measure with "
        "that one (reproduce.quantizers: published), or compare all the same by --own-quantizers"
    )


def find(study: Study, results: Path, archive: Path, own_quantizers: bool) -> Found:
    """Reads both sides and verifies what is compared.

    Args:
        study: The study, which says what is asked for again.
        results: Folder of the results that were measured again.
        archive: Folder of published records.
        own_quantizers: Whether results of quantizers that were calibrated again are compared where
            a quantizer is published.

    Raises:
        UserError: A record was edited or damaged, was measured with another configuration than the
            published one, or with another quantizer; one line each.
    """
    published: Archive = read_archive(archive)
    if not published:
        raise UserError(f"--archive: no published records below {archive}")
    by_key: dict[tuple[Any, ...], list[Published]] = {}
    for record in published.values():
        stage = str(record.content["kind"])
        by_key.setdefault(same_result(stage, record.content), []).append(record)
    pairs: list[Pair] = []
    alone: list[str] = []
    problems: list[str] = []
    used: set[tuple[Any, ...]] = set()
    for file, own in _own(results):
        stage = str(own.content["kind"])
        key = same_result(stage, own.content)
        if key not in by_key:
            alone.append(own.place)
            continue
        other = _nearest(by_key[key], own, study)
        if own.digest != other.digest:
            problems.append(
                f"{file}: field 'spec_digest': was measured with another configuration than "
                f"{other.where} ({printable(own.digest)}, not {printable(other.digest)}): the "
                "study's entry changed; measure the published one, or give yours a new name"
            )
            continue
        kept = _published_hash(archive, own)
        quantizer, problem = _quantizer(file, own, other, kept, own_quantizers)
        if problem is not None:
            problems.append(problem)
            continue
        used.add(key)
        names = {name: own.content[name] for name in names_in_place(stage)}
        theirs, mine = (Side(*verified_record(r, r.where, RESTORE)) for r in (other, own))
        pairs.append(Pair(stage, names, theirs, mine, quantizer))
    _refuse(problems)
    pairs = _whole(pairs, by_key.keys() - used)
    planned = _planned(study, published)
    missing = [
        Missing(key[0], {n: records[0].content[n] for n in names_in_place(key[0])}, key in planned)
        for key, records in by_key.items()
        if key not in used
    ]
    return Found(pairs, missing, alone)


def _whole(pairs: list[Pair], left: Iterable[tuple[Any, ...]]) -> list[Pair]:
    """Returns pairs that know whether other seeds of their task and scheme were left out."""
    partly = {key[:-1] for key in left}  # the last field of a place is the seed
    keys = (same_result(pair.stage, pair.names)[:-1] for pair in pairs)
    return [replace(pair, whole=key not in partly) for pair, key in zip(pairs, keys, strict=True)]


def _planned(study: Study, published: Archive) -> set[tuple[Any, ...]]:
    """Returns the keys of the published results that the study measures again."""
    if study.reproduce is None:
        return set()
    cells = [cell for stage in STAGES for cell in cells_of(study, stage, study.device)]
    return {same_result(c.stage, c.names) for c in to_measure(study, published, cells)}
