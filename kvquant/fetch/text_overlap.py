"""Refuses to measure perplexity on text that codebooks were fitted to.

Parts of one text are compared by their character ranges, and different texts by fingerprints: of
all runs of `GRAM` characters, those whose hash is a multiple of `KEEP`. The same passage therefore
has the same fingerprints in every text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from kvquant.errors import UserError
from kvquant.fetch.texts import load_text, read_data_manifest
from kvquant.formats.files import sha256_text

GRAM = 48
KEEP = 512
MAX_SHARE = 0.02  # fraction of fingerprints that two texts may share, for quotations
_BASE = np.uint64(0x9E3779B97F4A7C15)


class CalibratedText(BaseModel):
    """Describes the text that calibration read.

    Attributes:
        dataset: Name of the data set.
        sha256: Hash of the whole text.
        until: Number of leading characters that calibration read.
        fingerprints: Fingerprints of those characters.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dataset: str
    sha256: str
    until: int
    fingerprints: list[int]


def fingerprints(text: str) -> list[int]:
    """Returns the sorted 32-bit fingerprints of a text."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    count = len(codes) - GRAM + 1
    if count < 1:
        return []
    found = np.zeros(count, dtype=np.uint64)
    for at in range(GRAM):
        found = found * _BASE + codes[at : at + count]
    found ^= found >> np.uint64(29)  # the low bits of a product depend on low bits alone
    found *= _BASE
    found >>= np.uint64(32)
    chosen = np.unique(found[found % np.uint64(KEEP) == 0])
    return [int(value) for value in chosen]


def calibrated_text(manifest: str | Path) -> CalibratedText:
    """Describes what calibration reads from a text, for later comparison.

    Raises:
        UserError: The text is missing or was changed.
    """
    facts = read_data_manifest(manifest)
    part = load_text(manifest, "calibration")
    return CalibratedText(
        dataset=facts.dataset,
        sha256=facts.sha256,
        until=facts.test_from,
        fingerprints=fingerprints(part),
    )


def described_text(dataset: str, text: str) -> CalibratedText:
    """Describes a text all of which calibration reads.

    Args:
        dataset: What messages call the text.
        text: The text.
    """
    return CalibratedText(
        dataset=dataset,
        sha256=sha256_text(text),
        until=len(text),
        fingerprints=fingerprints(text),
    )


def shared_part(known: Collection[int], own: Sequence[int]) -> float:
    """Returns the fraction of a text that another one has; 0 if it is no more than a quotation.

    Args:
        known: Fingerprints of the other text.
        own: Fingerprints of the text.
    """
    found = set(known)
    shared = sum(value in found for value in own)
    return shared / len(own) if shared > max(1.0, MAX_SHARE * len(own)) else 0.0


def check_apart(calibrated: CalibratedText, manifest: str | Path) -> None:
    """Checks that the test part of a text holds nothing that calibration read.

    Args:
        calibrated: The text that calibration read.
        manifest: Manifest of the text whose test part is measured.

    Raises:
        UserError: The two overlap.
    """
    facts = read_data_manifest(manifest)
    if facts.sha256 == calibrated.sha256:
        if facts.test_from < calibrated.until:
            raise UserError(
                f"--data-manifest: {manifest}: its test part starts at character "
                f"{facts.test_from}, but the quantizer was calibrated on the first "
                f"{calibrated.until} of the same text: calibrate again"
            )
        return
    share = shared_share(calibrated, load_text(manifest, "test"))
    if share > 0:
        raise UserError(
            f"--data-manifest: {100 * share:.0f} % of the test part of "
            f"'{facts.dataset}' ({manifest}) is text that the quantizer was calibrated on "
            f"('{calibrated.dataset}'): use another text for one of them"
        )


def shared_share(calibrated: CalibratedText, text: str) -> float:
    """Returns the fraction of a text that calibration read; 0 if it is no more than a quotation.

    Args:
        calibrated: The text that calibration read.
        text: The text that is measured.
    """
    return shared_part(calibrated.fingerprints, fingerprints(text))
