"""Reads and writes the record and samples of a finished seed as a pair."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvquant.errors import UserError, printable
from kvquant.evaluation.base import SuiteResult
from kvquant.formats.files import read_text, write_new
from kvquant.runtime.progress import note
from kvquant.study.archive import RESTORE, Published
from kvquant.study.records import (
    EvalRecord,
    absent,
    parse_record,
    read_record,
    write_record,
    write_samples,
)
from kvquant.study.samples import verified_samples

RECORD, SAMPLES = "run.json", "samples.jsonl"
AGAIN = "delete it and run.json beside it to measure the seed again"


def _check(
    record: EvalRecord,
    where: object,
    digest: str,
    prompts: str | None,
    inputs: Mapping[str, str] | None,
) -> None:
    """Refuses a finished seed of another specification, other prompts or other files."""
    if record.spec_digest != digest:
        raise UserError(
            f"{where}: is the result of another specification "
            f"(digest {printable(record.spec_digest)}, expected {digest}): delete it by name"
        )
    if record.prompts_sha256 != prompts:
        raise UserError(
            f"{where}: holds the answers to other prompts (sha256 "
            f"{printable(record.prompts_sha256)}, expected {prompts}): delete it by name to "
            "measure it again"
        )
    for what, now in (inputs or {}).items():
        if record.inputs.get(what, now) != now:
            raise UserError(
                f"{where}: was measured with another {what} than the one given (sha256 "
                f"{printable(record.inputs[what][:12])}, not {now[:12]}): delete it by name to "
                "measure it again"
            )


def read_published(
    found: Published, digest: str, prompts: str | None, inputs: Mapping[str, str] | None = None
) -> tuple[EvalRecord, str]:
    """Returns the record and the samples' text of a published seed; see :func:`read_pair`."""
    record = parse_record(found.text, EvalRecord, found.where, RESTORE)
    _check(record, found.where, digest, prompts, inputs)
    verified_samples(record, found.samples, found.where, RESTORE)
    return record, found.samples


def read_pair(
    folder: Path, digest: str, prompts: str | None, inputs: Mapping[str, str] | None = None
) -> tuple[EvalRecord, str] | None:
    """Returns the record and the samples' text of a finished seed, or None without a record.

    Args:
        folder: Folder of the seed.
        digest: Digest of the expected specification.
        prompts: Hash of the seed's prompts, for suites that have them.
        inputs: Hashes of the files that the seed would be measured with now, which must equal those
            in the record.

    Raises:
        UserError: The record or its samples are damaged, or belong to another specification, to
            other prompts or to other files.
    """
    if absent(folder / RECORD):
        return None
    record = read_record(folder / RECORD, EvalRecord)
    _check(record, folder / RECORD, digest, prompts, inputs)
    samples = folder / SAMPLES
    text = "" if absent(samples) else read_text(samples, "samples", AGAIN)
    verified_samples(record, text, samples, AGAIN)
    return record, text


def _discard(path: Path) -> None:
    """Removes the file, link or folder at a path.

    Raises:
        UserError: It cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        if path.parent.is_file():  # where the seed's folder should be
            path.parent.unlink()
            return
        raise UserError(f"{path}: cannot be removed ({error.strerror or error})") from None


def kept(
    folder: Path, digest: str, prompts: str | None, inputs: Mapping[str, str] | None = None
) -> tuple[EvalRecord, str] | None:
    """Reads a pair of the resume folder, where a damaged one is reported and removed."""
    try:
        return read_pair(folder, digest, prompts, inputs)
    except UserError as error:
        note(f"resume: not used: {str(error).splitlines()[0]}")
        for name in (RECORD, SAMPLES):
            _discard(folder / name)
        return None


@contextlib.contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Keeps other runs from writing a seed's pair of files until the block ends.

    Without it, a run that finds no record yet would discard the samples of a run that is about to
    write its record.
    """
    handle = None
    # What cannot be made or opened is reported by the writing itself, and a file system without
    # locks leaves the refusal of `write_new` to differing content.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def copy(record: EvalRecord, samples: str, folder: Path) -> None:
    """Writes a finished seed into another folder, over samples that a killed job left."""
    with _one_writer(folder):
        if absent(folder / RECORD):
            _discard(folder / SAMPLES)
        write_new(folder / SAMPLES, samples)
        write_record(folder / RECORD, record)


def store(folder: Path, record: EvalRecord, result: SuiteResult) -> tuple[EvalRecord, str]:
    """Writes a measured seed, over samples that a killed job left, and returns the pair."""
    with _one_writer(folder):
        if absent(folder / RECORD):
            _discard(folder / SAMPLES)
        digest = write_samples(folder / SAMPLES, result.rows)
        record = record.model_copy(update={"samples_sha256": digest})
        write_record(folder / RECORD, record)
        return record, (folder / SAMPLES).read_text(encoding="utf-8")
