"""Random damage to a file: an edit by hand of one field, or one flipped bit."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


def fields(raw: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all fields of a JSON value that hold no further ones."""
    inner = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in inner:
        if isinstance(value, dict | list) and value:
            yield from fields(value, (*path, key))
        else:
            yield (*path, key)


def edited(value: Any, rng: random.Random) -> Any:
    """Another value of the same type, as someone would write it by hand."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 10])
    if isinstance(value, float):
        return value * rng.choice([0.5, 0.99, 1.000001, 2]) or 1.0
    if isinstance(value, str):
        return value[:-1] + ("0" if not value.endswith("0") else "1")
    return rng.choice([0, "x", True])


def edit_field(text: str, rng: random.Random) -> str:
    """One field of a JSON text changed, taken out or doubled; the form stays."""
    raw = json.loads(text)
    path = rng.choice(list(fields(raw)))
    place = raw
    for part in path[:-1]:
        place = place[part]
    way = rng.random()
    if way < 0.7:
        place[path[-1]] = edited(place[path[-1]], rng)
    elif way < 0.8 and isinstance(place, dict):
        del place[path[-1]]
    elif way < 0.9:
        place[path[-1]] = str(place[path[-1]]) + " "
    else:
        more = copy.deepcopy(place[path[-1]])
        place.append(more) if isinstance(place, list) else place.update({"more": more})
    return json.dumps(raw, indent=2) + "\n"


def mutated(file: Path, rng: random.Random) -> bytes:
    """The bytes of a file with one mutation."""
    raw = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.6:
        return edit_field(raw.decode(), rng).encode()
    if file.suffix == ".jsonl" and rng.random() < 0.6:
        lines = raw.decode().split("\n")
        at = rng.randrange(len(lines) - 1)
        lines[at] = json.dumps(json.loads(edit_field(lines[at], rng)), sort_keys=True)
        return "\n".join(lines).encode()
    at = rng.randrange(len(raw))
    changed = bytearray(raw)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damaged_copy(file: Path, data: st.DataObject) -> Path:
    """Copies a file beside it with another byte somewhere, or cut off there."""
    raw = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    copied = file.with_name(f"damaged{file.suffix}")
    copied.write_bytes(raw if data.draw(st.booleans()) else raw[:at])
    return copied
