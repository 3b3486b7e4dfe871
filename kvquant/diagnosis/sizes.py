"""Reads and writes sizes of memory as people type them: 24GB, 512MiB."""

from __future__ import annotations

import re

from kvquant.errors import UserError

MOST = 10**18
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def size_in_bytes(text: str, field: str) -> int:
    """Returns the bytes of a size such as "24GB" (10^9) or "24GiB" (2^30).

    Args:
        text: A number with a unit.
        field: The option that messages name.

    Raises:
        UserError: It is no size, has no unit, or is too large.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not found[2]:
        raise UserError(f"{field}: '{text}' is no size of memory; write 24GB or 24GiB")
    power = _UNITS[found[2].lower()]
    size = float(found[1]) * (1024 if found[3] else 1000) ** power
    if size > MOST:
        raise UserError(f"{field}: '{text[:20]}' is more than any memory has")
    return int(size)


def in_gb(nbytes: float) -> str:
    """Returns bytes as gigabytes of 10^9 bytes, in words."""
    return f"{nbytes / 1e9:,.2f} GB"
