"""`kvquant publish`: verifies the results of finished jobs and adds them to the published records.

A record is published once: the same record is accepted again, another one of the same name is
refused. Either all records of a folder are published, or none.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, printable
from kvquant.formats.files import read_json, read_text
from kvquant.study.archive import (
    CURVES,
    RESTORE,
    Archive,
    Published,
    curves_name,
    packed,
    read_archive,
    renew_sums,
    write_archive,
)
from kvquant.study.published_quantizers import (
    add_quantizers,
    lost_manifests,
    new_quantizers,
    quantizer_problems,
)
from kvquant.study.record_types import EvalRecord, Record
from kvquant.study.records import AGAIN, parse_record
from kvquant.study.samples import verified_samples
from kvquant.study.seal import KINDS, record_files


def _kind(content: object, where: object) -> type[Record]:
    kind = KINDS.get(str(content.get("kind"))) if isinstance(content, dict) else None
    if kind is None:
        raise UserError(f"{where}: field 'kind': is none of {', '.join(KINDS)}")
    return kind


def verified_record(
    record: Published, where: str, again: str
) -> tuple[Record, list[dict[str, Any]]]:
    """Returns a record and its samples, verified in full.

    Args:
        record: As published, or as it would be.
        where: Its file, for messages.
        again: What a user does about a record that was changed.

    Raises:
        UserError: The record or its samples were changed, or contradict themselves.
    """
    parsed = parse_record(record.text, _kind(record.content, where), where, again)
    if not isinstance(parsed, EvalRecord):
        return parsed, []
    return parsed, verified_samples(parsed, record.samples, where, again)


def finished_record(file: Path, results: Path) -> Published:
    """Returns the verified record of a job's file, as it would be published.

    Args:
        file: The file below the results folder.
        results: The study's results folder.

    Raises:
        UserError: The record or its samples are damaged or were changed, or lie in another place.
    """
    _kind(read_json(file, "record", AGAIN), file)
    text, samples = read_text(file, "record", AGAIN), ""
    if file.name == "run.json":
        samples = read_text(file.with_name("samples.jsonl"), "samples", AGAIN)
    try:
        found = packed(text, samples, str(file))
    except ValueError as error:
        raise UserError(f"{file}: {printable(error)}: {AGAIN}") from None
    if str(file.relative_to(results)) != found.place:
        raise UserError(f"{file}: is the record of {found.place}: {AGAIN}")
    verified_record(found, str(file), AGAIN)
    return found


def publish(results: Path, archive: Path) -> tuple[int, int]:
    """Adds the records below a study's results folder to its published records.

    Returns:
        The number of records that are published now, and of those that were before.

    Raises:
        UserError: A record is damaged, of another study, or was published with other content, or
            a quantizer is; a line for each, and nothing is published.
    """
    there = read_archive(archive)
    studies = {str(record.content.get("study")) for record in there.values()}
    added: Archive = {}
    curves: dict[str, str] = {}
    problems: list[str] = []
    before = 0
    for file in record_files(results):
        try:
            record = finished_record(file, results)
        except UserError as error:
            problems.append(str(error))
            continue
        old = there.get(record.place)
        if old is not None and old.seal != record.seal:
            problems.append(
                f"{file}: is another record than the published one ({old.where}): delete it by "
                "name, or give the changed entry of the study a new name"
            )
        elif studies and (mine := str(record.content["study"])) not in studies:
            whose = "the published records'" if there else "that of the records before it"
            problems.append(
                f"{file}: field 'study': is '{mine}', {whose} is "
                f"'{', '.join(sorted(studies))}': publish it in a folder of its own"
            )
        elif old is not None:
            before += 1
        else:
            studies.add(str(record.content["study"]))  # the first to be published are of one, too
            added[record.place] = record
            if (samples := file.with_suffix(CURVES)).exists():
                curves[curves_name(record)] = read_text(samples, "samples", AGAIN)
    added_all = there | added
    problems += quantizer_problems(archive, added_all.values())
    try:  # before anything is written
        new_quantizers(results, archive, added_all.values())
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    if added:
        write_archive(archive, added_all, curves)
    return len(added), before


def verify(archive: Path) -> int:
    """Verifies every published record in full and returns how many there are."""
    records = read_archive(archive)
    if not records:
        raise UserError(f"--archive: no published records below {archive}")
    problems = lost_manifests(archive) + quantizer_problems(archive, records.values())
    for record in records.values():
        try:
            verified_record(record, record.where, RESTORE)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return len(records)


def run(args: argparse.Namespace) -> None:
    """Publishes finished records, then verifies all that are published."""
    if args.renew_sums:
        renew_sums(args.archive)
    if args.results is not None:
        new, before = publish(args.results, args.archive)
        print(f"publish: {new} records published, {before} were before")
        for name in add_quantizers(args.results, args.archive, read_archive(args.archive).values()):
            print(f"publish: quantizer of {name}")
    print(f"publish: {verify(args.archive)} published records are as they were measured")
