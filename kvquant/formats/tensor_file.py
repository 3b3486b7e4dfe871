"""A JSON file beside a safetensors file: both prove that they are whole and belong together.

The JSON holds the sha256 of the tensor file (`tensors_sha256`) and one over its own content
(`seal`), so that neither can be edited, cut short or exchanged without being refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvquant.errors import UserError
from kvquant.formats.files import read_json, replace, replacing, sha256_file, write_json
from kvquant.formats.sealing import seal_of


def save_pair(
    manifest: Path, file: Path, info: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Writes both files; the JSON last, so that its presence means a whole pair.

    Args:
        manifest: The JSON file.
        file: The safetensors file.
        info: What the JSON states; hashes are added.
        tensors: The tensors.

    Returns:
        The content of the JSON file.

    Raises:
        UserError: The folder cannot be written.
    """
    with replacing(file) as temporary:
        try:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary)
        except SafetensorError as error:  # a full disk, which the library reports in its own way
            raise UserError(f"{file}: cannot be written ({str(error).splitlines()[0]})") from None
    found = {**info, "tensors_sha256": sha256_file(file)}
    found["seal"] = seal_of(found)
    replace(manifest, write_json(found))
    return found


def read_info(manifest: Path, field: str, again: str) -> dict[str, Any]:
    """The JSON of a pair, checked against its own seal.

    Args:
        manifest: The JSON file.
        field: Names it in messages.
        again: How to get it made again, for messages.

    Raises:
        UserError: It is missing, damaged, was edited, or is of a version without hashes.
    """
    found = read_json(manifest, field, again)
    if not isinstance(found, dict):
        raise UserError(f"{field}: {manifest} is damaged (not an object): {again}")
    if "seal" not in found or "tensors_sha256" not in found:
        raise UserError(
            f"{field}: {manifest} is of an older version or damaged (it has no hashes): {again}"
        )
    try:
        intact = found["seal"] == seal_of(found)
    except ValueError:  # half a character
        intact = False
    if not intact:
        raise UserError(f"{field}: {manifest} is damaged or was edited (its seal differs): {again}")
    return found


def read_tensors(
    file: Path, sha256: object, shapes: Mapping[str, tuple[int, ...] | None], field: str, again: str
) -> dict[str, torch.Tensor]:
    """The tensors of a pair.

    Args:
        file: The safetensors file.
        sha256: Its hash, as the JSON states it.
        shapes: Exactly the tensors that must be there; None where any shape will do.
        field: Names the file in messages.
        again: How to get it made again, for messages.

    Returns:
        fp32 tensors on the CPU, all finite.

    Raises:
        UserError: Another file than the JSON's, or tensors of other names, types or shapes, or
            with values that are not finite.
    """
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else "is missing"
        raise UserError(f"{field}: {file} {what}: {again}")
    try:
        got = sha256_file(file)
        tensors = load_file(file) if got == sha256 else {}
    except Exception as error:  # safetensors has an error type of its own
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{field}: {file} is damaged ({told}): {again}") from None
    if got != sha256:
        raise UserError(
            f"{field}: {file} is damaged or another one than its JSON's (sha256 differs): {again}"
        )
    if odd := sorted(set(tensors) ^ set(shapes)):
        what = "lacks" if odd[0] in shapes else "has too many:"
        raise UserError(f"{field}: {file} {what} {odd[0]} ({len(odd)} in all): {again}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.dtype != torch.float32:
            raise UserError(f"{field}: {file}: {name} is {tensor.dtype}, not float32: {again}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise UserError(
                f"{field}: {file}: {name} has shape {list(tensor.shape)}, its JSON tells "
                f"{list(shape)}: {again}"
            )
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{field}: {file}: {name} holds values that are not finite: {again}")
    return tensors
