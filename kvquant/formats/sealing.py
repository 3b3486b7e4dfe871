"""The seal of a result: a hash over its own content, which tells that nothing in it was changed.

A seal is no signature: whoever can write the files can also seal them. It finds what happens by
accident or in passing: a bit that flipped, an edit by hand, a half copied file, a merge.
"""

from __future__ import annotations

from typing import Any

from kvquant.formats.files import canonical_json, sha256_text

SEAL = "seal"


def seal_of(content: dict[str, Any]) -> str:
    """sha256 of an object's canonical JSON without the entry that holds its seal.

    Raises:
        ValueError: The object holds what strict JSON in UTF-8 cannot hold.
    """
    try:
        return sha256_text(canonical_json({k: v for k, v in content.items() if k != SEAL}))
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    except TypeError as error:
        raise ValueError(f"holds what JSON cannot ({error})") from None


def check_seal(content: dict[str, Any]) -> None:
    """Compares an object with its seal.

    Raises:
        ValueError: There is no seal, or it is that of other content.
    """
    found = content.get(SEAL)
    if not found:
        raise ValueError(f"field '{SEAL}': is missing")
    if found != seal_of(content):
        raise ValueError(
            f"was changed after it was written (its content is not what field '{SEAL}' was made of)"
        )
