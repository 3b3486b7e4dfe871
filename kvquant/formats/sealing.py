"""The seal of a result: a hash over its own content, which detects changes.

A seal is not a signature, because whoever can write the files can also seal them. It detects
accidents: a flipped bit, an edit by hand, a partly copied file, a merge.
"""

from __future__ import annotations

from typing import Any

from kvquant.formats.files import canonical_json, sha256_text

SEAL = "seal"


def seal_of(content: dict[str, Any]) -> str:
    """Returns the sha256 of an object's canonical JSON without its seal.

    Raises:
        ValueError: The object cannot be written as strict JSON in UTF-8.
    """
    try:
        return sha256_text(canonical_json({k: v for k, v in content.items() if k != SEAL}))
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which UTF-8 cannot encode") from None
    except TypeError as error:
        raise ValueError(f"holds a value that JSON cannot ({error})") from None


def check_seal(content: dict[str, Any]) -> None:
    """Compares an object with its seal.

    Raises:
        ValueError: The seal is missing or does not match the content.
    """
    found = content.get(SEAL)
    if not found:
        raise ValueError(f"field '{SEAL}': is missing")
    if found != seal_of(content):
        raise ValueError(
            f"was changed after it was written (its content does not match its field '{SEAL}')"
        )
