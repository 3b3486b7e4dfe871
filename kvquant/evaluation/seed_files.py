"""The two files of a finished seed, its record and its samples, as whole pairs."""

from __future__ import annotations

from pathlib import Path

from kvquant.errors import UserError
from kvquant.evaluation.base import SuiteResult
from kvquant.fetch.progress import note
from kvquant.files import sha256_text, write_new
from kvquant.records import EvalRecord, read_record, write_record, write_samples

RECORD, SAMPLES = "run.json", "samples.jsonl"


def read_pair(folder: Path, digest: str, prompts: str | None) -> tuple[EvalRecord, str] | None:
    """A finished seed: its record and the text of its samples; None where there is no record.

    Args:
        folder: Where it is.
        digest: Of the specification.
        prompts: Hash of the seed's prompts, for suites that have them.

    Raises:
        UserError: The record or its samples are damaged, or belong to another specification or to
            other prompts.
    """
    if not (folder / RECORD).is_file():
        return None
    record = read_record(folder / RECORD, EvalRecord)
    if record.spec_digest != digest:
        raise UserError(
            f"{folder / RECORD}: is the result of another specification "
            f"(digest {record.spec_digest}, expected {digest}): delete it by name"
        )
    if record.prompts_sha256 != prompts:
        raise UserError(
            f"{folder / RECORD}: holds the answers to other prompts (sha256 "
            f"{record.prompts_sha256}, expected {prompts}): delete it by name to measure again"
        )
    samples = folder / SAMPLES
    text = samples.read_text(encoding="utf-8") if samples.is_file() else ""
    if sha256_text(text) != record.samples_sha256:
        raise UserError(
            f"{samples}: missing, truncated or changed (sha256 differs from the record's): "
            "delete it and run.json beside it and run again to measure it anew"
        )
    return record, text


def kept(folder: Path, digest: str, prompts: str | None) -> tuple[EvalRecord, str] | None:
    """As :func:`read_pair` for the resume folder, where what is damaged is told and dropped."""
    try:
        return read_pair(folder, digest, prompts)
    except UserError as error:
        note(f"resume: not used: {str(error).splitlines()[0]}")
        for name in (RECORD, SAMPLES):
            (folder / name).unlink(missing_ok=True)
        return None


def copy(record: EvalRecord, samples: str, folder: Path) -> None:
    """Writes a finished seed into another folder."""
    write_new(folder / SAMPLES, samples)
    write_record(folder / RECORD, record)


def store(folder: Path, record: EvalRecord, result: SuiteResult) -> tuple[EvalRecord, str]:
    """Writes a measured seed; samples without a record are what a killed job left."""
    if not (folder / RECORD).is_file():
        (folder / SAMPLES).unlink(missing_ok=True)
    digest = write_samples(folder / SAMPLES, result.rows)
    record = record.model_copy(update={"samples_sha256": digest})
    write_record(folder / RECORD, record)
    return record, (folder / SAMPLES).read_text(encoding="utf-8")
