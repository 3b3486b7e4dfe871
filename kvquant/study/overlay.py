"""Reads variants of a study, files that name a `base` and hold only what differs from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvquant.errors import UserError
from kvquant.study.study_file import read_mapping


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns the mapping `below` with the values of `above` merged over it.

    Mappings are merged key by key, as Snakemake merges its config files. Every other value, a list
    included, replaces the one below it. A null removes a mapping or a list below it (a task, a
    scheme, a section, a scheme's own tasks); over anything else it is the value.
    """
    result = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if value is None and isinstance(old, dict | list):
            del result[key]
        elif isinstance(value, dict) and isinstance(old, dict):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _base_file(file: Path, name: Any) -> Path:
    """Returns the file that a variant's `base` names, relative to the variant's own folder."""
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise UserError(f"{file}: base: must be the name of a study file, such as config.yaml")
    return file.parent / name


def read_study(path: str | Path, field: str = "--study") -> Any:
    """Reads a study file and merges it over its `base`, where it names one.

    Args:
        path: The YAML or JSON file.
        field: The option that named the file, for messages.

    Returns:
        The content without the key `base`, not yet validated.

    Raises:
        UserError: A file cannot be read, or a base is missing, not a mapping or its own base.
    """
    file = Path(path)
    above = [read_mapping(file, field)]
    seen = [file]
    while isinstance(above[-1], dict) and "base" in above[-1]:
        base = _base_file(file, above[-1].pop("base"))
        content = read_mapping(base, f"{file}: base")  # refuses what is no file
        if base.resolve() in [one.resolve() for one in seen]:
            circle = " -> ".join(map(str, [*seen, base]))
            raise UserError(f"{file}: base: a study cannot be its own base: {circle}")
        above.append(content)
        if not isinstance(above[-1], dict):
            raise UserError(f"{file}: base: {base} does not hold a mapping of keys")
        file = base
        seen.append(base)
    study = above.pop()
    while above:
        study = merged(study, above.pop())
    return study


def read_studies(files: Iterable[str | Path], values: dict[str, Any]) -> dict[str, Any]:
    """Reads the study of a Snakemake run from its config files, in their order.

    Args:
        files: The files of `configfile:` and `--configfile`; later ones go over earlier ones.
        values: The values of `--config`, merged over all files.

    Raises:
        UserError: As :func:`read_study`, or a file is not a mapping.
    """
    result: dict[str, Any] = {}
    for file in files:
        study = read_study(file, "--configfile")
        if not isinstance(study, dict):
            raise UserError(f"{file}: expected a mapping of keys, got {type(study).__name__}")
        result = merged(result, study)
    return merged(result, values)
