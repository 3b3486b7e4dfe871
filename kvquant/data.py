"""Reading fetched texts."""

from __future__ import annotations

import json
from pathlib import Path

from kvquant.errors import UserError
from kvquant.records import sha256_text


def load_text(manifest: str | Path) -> str:
    """The text that belongs to a manifest of `kvquant fetch-data`, its hash verified.

    Raises:
        UserError: A file is missing or the text is not the one that was fetched.
    """
    file = Path(manifest)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        text = file.with_name("text.txt").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"--data-manifest: no such file: {error.filename}") from None
    except json.JSONDecodeError:
        raise UserError(f"--data-manifest: {file} is damaged: delete it and fetch again") from None
    if sha256_text(text) != record.get("sha256"):
        raise UserError(f"--data-manifest: text of {file} has changed: delete it and fetch again")
    return text
