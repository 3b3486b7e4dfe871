"""The places of records: the file that a job writes, and the packed file that publishes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kvquant.study.paths import NAME

# By the field `kind` of a record; the fields in braces are the record's own.
PLACES = {
    "eval": "eval/{model}/{scheme}/{task}/seed{seed}/run.json",
    "throughput": "perf/{device}/{model}/{scheme}/{workload}/rep{rep}.json",
    "energy": "energy/{device}/{model}/{scheme}/{workload}/rep{rep}.json",
    "append": "append/{device}/rep{rep}.json",
    "kernels": "kernels/{device}/{case}.json",
    "jobs": "jobs/{device}/{case}.json",
}
PACKED = {
    "eval": "eval/{model}/{scheme}.jsonl",
    "throughput": "perf/{device}.jsonl",
    "energy": "energy/{device}.jsonl",
    "append": "append/{device}.jsonl",
    "kernels": "kernels/{device}.jsonl",
    "jobs": "jobs/{device}.jsonl",
}


def place_of(kind: str, fields: Mapping[str, Any]) -> str:
    """Returns the path of a record's file below its study's results folder.

    Raises:
        ValueError: The kind is unknown, or a field cannot be part of a path.
    """
    return _filled(PLACES, kind, fields)


def packed_place(kind: str, fields: Mapping[str, Any]) -> str:
    """Returns the path of the packed file that a record is published in."""
    return _filled(PACKED, kind, fields)


def names_in_place(kind: str) -> list[str]:
    """Returns the fields of a record that its place names.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind not in PLACES:
        raise ValueError(f"field 'kind': is none of {', '.join(PLACES)}")
    return re.findall(r"\{(\w+)\}", PLACES[kind])


def in_order(place: str) -> tuple[tuple[int, int, str], ...]:
    """Returns a key by which places are sorted with their numbers by value: seed 2, seed 10."""
    parts = re.split(r"(\d+)", place)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts)


def _filled(patterns: Mapping[str, str], kind: str, fields: Mapping[str, Any]) -> str:
    if kind not in patterns:
        raise ValueError(f"field 'kind': is none of {', '.join(patterns)}")
    names = re.findall(r"\{(\w+)\}", patterns[kind])
    for name in names:
        value = fields.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not whole and not (isinstance(value, str) and NAME.fullmatch(value)):
            raise ValueError(f"field '{name}': is missing, or no name in kebab case")
    return patterns[kind].format_map(dict(fields))


def calibration_place(model: str, calibration: str | None) -> str:
    """Returns the folder of a model's calibration statistics below the results folder.

    Args:
        model: Name of the model.
        calibration: Entry of `calibrations`; None: the study's `calibration`.
    """
    return f"calib/{model}" if calibration is None else f"calib/{model}/{calibration}"
