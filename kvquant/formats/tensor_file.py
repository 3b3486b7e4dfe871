"""A safetensors file with a JSON file beside it, both checked by hashes.

The JSON holds the sha256 of the tensor file (`tensors_sha256`) and one over its own content
(`seal`), so that an edited, truncated or exchanged file is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvquant.errors import UserError
from kvquant.formats.files import json_text, read_json, replace, replacing, sha256_file
from kvquant.formats.sealing import seal_of


def save_pair(
    manifest: Path, file: Path, info: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Writes both files, the JSON last, so that its presence means a whole pair.

    Args:
        manifest: The JSON file.
        file: The safetensors file.
        info: Content of the JSON, to which the hashes are added.
        tensors: The tensors by name.

    Returns:
        The content of the JSON file.

    Raises:
        UserError: The folder cannot be written.
    """
    with replacing(file) as temporary:
        try:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary)
        except SafetensorError as error:  # the library's own report of a full disk
            raise UserError(f"{file}: cannot be written ({str(error).splitlines()[0]})") from None
    found = {**info, "tensors_sha256": sha256_file(file)}
    found["seal"] = seal_of(found)
    replace(manifest, json_text(found))
    return found


def read_info(manifest: Path, field: str, again: str) -> dict[str, Any]:
    """Returns the JSON of a pair after checking its seal.

    Args:
        manifest: The JSON file.
        field: The option that messages name.
        again: How the user makes the file again, for messages.

    Raises:
        UserError: The file is missing, damaged, edited, or of a version without hashes.
    """
    found = read_json(manifest, field, again)
    if not isinstance(found, dict):
        raise UserError(f"{field}: {manifest} is damaged (not an object): {again}")
    if "seal" not in found or "tensors_sha256" not in found:
        raise UserError(
            f"{field}: {manifest} is from an older version or damaged (it has no hashes): {again}"
        )
    try:
        intact = found["seal"] == seal_of(found)
    except ValueError:  # a lone surrogate
        intact = False
    if not intact:
        raise UserError(f"{field}: {manifest} is damaged or was edited (its seal differs): {again}")
    return found


def read_tensors(
    file: Path,
    sha256: object,
    shapes: Mapping[str, tuple[int, ...] | None],
    field: str,
    again: str,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pair after checking hash, names, dtypes, shapes and values.

    Args:
        file: The safetensors file.
        sha256: Its hash as stated in the JSON.
        shapes: Shape of each expected tensor by name; None accepts any shape.
        field: The option that messages name.
        again: How the user makes the file again, for messages.
        dtypes: Dtypes of tensors that are not fp32, by name.

    Returns:
        Tensors on the CPU, all finite.

    Raises:
        UserError: One of the checks fails.
    """
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else "is missing"
        raise UserError(f"{field}: {file} {what}: {again}")
    try:
        got = sha256_file(file)
        tensors = load_file(file) if got == sha256 else {}
    except Exception as error:  # safetensors has an error type of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{field}: {file} is damaged ({reason}): {again}") from None
    if got != sha256:
        raise UserError(
            f"{field}: {file} is damaged or not the file of its JSON (sha256 differs): {again}"
        )
    if odd := sorted(set(tensors) ^ set(shapes)):
        what = "lacks" if odd[0] in shapes else "has an unexpected tensor"
        raise UserError(f"{field}: {file} {what} {odd[0]} ({len(odd)} in all): {again}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        dtype = (dtypes or {}).get(name, torch.float32)
        if tensor.dtype != dtype:
            wanted = str(dtype).removeprefix("torch.")
            raise UserError(f"{field}: {file}: {name} is {tensor.dtype}, not {wanted}: {again}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise UserError(
                f"{field}: {file}: {name} has shape {list(tensor.shape)}, but its JSON says "
                f"{list(shape)}: {again}"
            )
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{field}: {file}: {name} holds values that are not finite: {again}")
    return tensors
