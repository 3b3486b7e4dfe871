"""Reads and writes published records: few text files, each line of which checks itself.

A study's folder of published records holds one file per model and scheme (evaluations) or per
device (all that is timed), and `SHA256SUMS` of these files, which `sha256sum -c` reads. A line is a
record, the content of a job's own file in one line of JSON with its seal. The samples of an
evaluation follow it, a line each, exactly as the job wrote them: the record holds their number and
hash. Beside the records of a device lie the samples of power and clocks that its jobs took (CSV),
which only `SHA256SUMS` covers, as no number rests on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, printable
from kvquant.formats.files import parse_json, read_text, replace, sha256_text
from kvquant.formats.sealing import SEAL, check_seal
from kvquant.study.places import in_order, packed_place, place_of

SUMS = "SHA256SUMS"
RESTORE = "published records are never edited: take the file from version control again"
CURVES = ".csv"  # samples of power, clocks and temperature
START = '{"schema_version"'  # of a record's line, and of no sample's
MOST = 20  # problems in one message


@dataclass(frozen=True)
class Published:
    """A published record and its samples.

    Attributes:
        place: Path of the file that the job wrote, below its study's results folder.
        packed: Path of the packed file below the folder of published records.
        where: File and line, for messages.
        text: The record's line.
        content: The record as plain data; its seal is checked when its file is not as published,
            and by whoever parses the text.
        samples: The samples' text, as in `samples.jsonl`; empty for a record without samples.
    """

    place: str
    packed: str
    where: str
    text: str
    content: Mapping[str, Any]
    samples: str = ""

    @property
    def digest(self) -> str:
        """Returns the digest of the specification that was measured."""
        return str(self.content.get("spec_digest"))

    @property
    def seal(self) -> str:
        """Returns the record's seal."""
        return str(self.content.get(SEAL))


Archive = dict[str, Published]  # by place


def line_of(text: str) -> str:
    """Returns the text of a record as one line of JSON with the same fields in the same order."""
    return json.dumps(parse_json(text), ensure_ascii=False, allow_nan=False)


def packed(text: str, samples: str, where: str) -> Published:
    """Returns a record that a job wrote, with its samples, as it is published."""
    content = parse_json(text)
    kind = str(content.get("kind"))
    place = place_of(kind, content)
    return Published(place, packed_place(kind, content), where, line_of(text), content, samples)


def _sums(folder: Path) -> dict[str, str]:
    """Returns the hash of each packed file by its path, as `SHA256SUMS` has them."""
    file = folder / SUMS
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(file, "published", RESTORE).splitlines(), start=1):
        digest, gap, name = line.partition("  ")
        if not gap or len(digest) != 64 or name in found:
            raise UserError(f"{file}:{number}: is no hash and file name: {RESTORE}")
        known = name.endswith((".jsonl", CURVES))
        if Path(name).is_absolute() or ".." in Path(name).parts or not known:
            raise UserError(f"{file}:{number}: names no file of records in this folder: {RESTORE}")
        found[name] = digest
    return found


def _records(text: str, name: str, folder: Path) -> Iterable[Published]:
    """Yields the records of a packed file.

    Raises:
        UserError: A line is no record, belongs into another file, or its samples are cut.
    """
    lines = text.split("\n")  # not splitlines(), which also splits at U+2028 inside an answer
    if lines.pop():
        raise UserError(f"{folder / name}: is cut, its last line has no end: {RESTORE}")
    at = 0
    while at < len(lines):
        where = f"{folder / name}:{at + 1}"
        try:
            content = parse_json(lines[at])
            if not isinstance(content, dict) or "kind" not in content:
                raise ValueError("is no record")
            kind = str(content["kind"])
            place = place_of(kind, content)
            if packed_place(kind, content) != name:
                raise ValueError(f"holds a record of {packed_place(kind, content)}")
            count = content.get("samples") if kind == "eval" else 0
            if not isinstance(count, int) or not 0 <= count < len(lines) - at:
                raise ValueError(f"{place}: {count!r} samples do not follow it")
            if any(line.startswith(START) for line in lines[at + 1 : at + 1 + count]):
                raise ValueError(f"{place}: fewer samples follow it than its {count}")
        except ValueError as error:
            raise UserError(f"{where}: {printable(error)}: {RESTORE}") from None
        samples = "".join(f"{line}\n" for line in lines[at + 1 : at + 1 + count])
        yield Published(place, name, where, lines[at], content, samples)
        at += 1 + count


def _damage(record: Published) -> str | None:
    """Returns what is wrong with a record by its own seal, or None."""
    try:
        check_seal(dict(record.content))
    except ValueError as error:
        return f"{record.where}: {record.place}: {printable(error)}: {RESTORE}"
    if record.samples and sha256_text(record.samples) != record.content.get("samples_sha256"):
        return f"{record.where}: {record.place}: its samples were changed or mixed: {RESTORE}"
    return None


def _changed_curves(file: Path, digest: str) -> list[str]:
    """Returns what is wrong with a job's samples of power and clocks."""
    try:
        text = read_text(file, "published", RESTORE)
    except UserError as error:
        return [str(error)]
    return [] if sha256_text(text) == digest else [f"{file}: was changed: {RESTORE}"]


def curves_name(record: Published) -> str:
    """Returns the path below the archive of the samples of power that a job took."""
    place, folder = Path(record.place), Path(record.packed).parent
    return str(folder / "-".join(place.relative_to(folder).with_suffix(CURVES).parts))


def read_archive(folder: str | Path) -> Archive:
    """Reads all published records of a study; none where there is no such folder or it is empty.

    Files are compared with `SHA256SUMS`. In one that differs every record is compared with its own
    seal, so that the message names what was edited.

    Raises:
        UserError: A file or record is not as it was published; a line for each.
    """
    root = Path(folder)
    found: Archive = {}
    there = {str(f.relative_to(root)) for f in root.rglob("*") if f.suffix in (".jsonl", CURVES)}
    if not there and not (root / SUMS).exists():
        return found
    sums, problems = _sums(root), list[str]()
    for name in sorted(there - sums.keys()):
        problems.append(f"{root / name}: is not in {SUMS} ({_renew(root)})")
    for name, digest in sums.items():
        if name.endswith(CURVES):
            problems += _changed_curves(root / name, digest)
            continue
        try:
            text = read_text(root / name, "published", RESTORE)
            records = list(_records(text, name, root))
        except UserError as error:
            problems.append(str(error))
            continue
        if sha256_text(text) != digest:
            damaged = [what for what in map(_damage, records) if what is not None]
            whole = f"{root / name}: is not the file of {SUMS}, though each record is whole"
            problems += damaged or [f"{whole}: {RESTORE}, or after a merge {_renew(root)}"]
        for record in records:
            other = found.setdefault(record.place, record)
            if other is not record:
                problems.append(f"{record.where}: {record.place} is at {other.where}, too")
    if problems:
        rest = len(problems) - MOST
        raise UserError("\n".join(problems[:MOST] + [f"and {rest} more"] * (rest > 0)))
    return found


def _renew(root: Path) -> str:
    return f"renew it by `kvquant publish --renew-sums --archive {root}`"


def sums_text(files: Mapping[str, str]) -> str:
    """Returns the content of `SHA256SUMS` for files given as path and text."""
    return "".join(f"{sha256_text(files[name])}  {name}\n" for name in sorted(files))


def write_archive(
    folder: str | Path, records: Archive, curves: Mapping[str, str] | None = None
) -> None:
    """Writes published records in a stable order, and `SHA256SUMS` last.

    Args:
        folder: The study's folder of published records.
        records: All of them.
        curves: The text of further samples of power, by path; those that are there stay.
    """
    root = Path(folder)
    files: dict[str, str] = {
        str(file.relative_to(root)): read_text(file, "published", RESTORE)
        for file in root.rglob(f"*{CURVES}")
    }
    files |= curves or {}
    for place in sorted(records, key=in_order):
        record = records[place]
        files[record.packed] = files.get(record.packed, "") + f"{record.text}\n{record.samples}"
    for name, text in files.items():
        if not (root / name).exists() or (root / name).read_text(encoding="utf-8") != text:
            replace(root / name, text)
    replace(root / SUMS, sums_text(files))


def renew_sums(folder: str | Path) -> None:
    """Writes `SHA256SUMS` anew, after a merge of two sets of published records.

    Raises:
        UserError: There are no records, or one is not whole by its own seal, or there twice.
    """
    root = Path(folder)
    texts = {
        str(file.relative_to(root)): read_text(file, "published", RESTORE)
        for file in sorted(root.rglob("*.jsonl"))
    }
    if not texts:
        raise UserError(f"--archive: no published records below {root}")
    if empty := [name for name, text in texts.items() if not text]:
        raise UserError(f"{root / empty[0]}: is empty: remove it")
    records = [record for name, text in texts.items() for record in _records(text, name, root)]
    problems = [what for what in map(_damage, records) if what is not None]
    seen: Archive = {}
    for record in records:
        if seen.setdefault(record.place, record) is not record:
            problems.append(f"{record.where}: {record.place} is at {seen[record.place].where}, too")
    if problems:
        raise UserError("\n".join(problems[:MOST]))
    write_archive(root, seen)
