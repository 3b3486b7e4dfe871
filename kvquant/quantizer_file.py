"""The quantizer artifact: `quantizer.json` and `quantizer.safetensors`; never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from kvquant.errors import UserError
from kvquant.files import temporary_name
from kvquant.layer_quantizer import LayerQuantizer

FIELDS = ("key_zero", "key_scale", "key_levels", "value_levels")


class QuantizerManifest(BaseModel):
    """What the tables were built from and for."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    library_version: str
    model: str
    weights_sha256: str
    scheme: str
    spec: dict[str, Any]
    calibration: dict[str, Any]
    spec_digest: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    calibration_error: dict[str, float]


def tensors_path(manifest: Path) -> Path:
    """The tensor file that belongs to a quantizer.json."""
    return manifest.with_suffix(".safetensors")


def save_quantizer(path: Path, manifest: QuantizerManifest, layers: list[LayerQuantizer]) -> None:
    """Writes both files; the JSON last, so that its presence means a whole artifact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"layers.{i}.{field}": getattr(layer, field).contiguous()
        for i, layer in enumerate(layers)
        for field in FIELDS
    }
    temporary = temporary_name(path)
    save_file(tensors, temporary)
    temporary.replace(tensors_path(path))
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def load_quantizer(
    path: Path, *, weights_sha256: str | None, device: torch.device | str = "cpu"
) -> tuple[QuantizerManifest, list[LayerQuantizer]]:
    """Reads a quantizer and checks that it was built for the model at hand.

    Args:
        path: quantizer.json.
        weights_sha256: Hash of the model's weights; None skips the check (a model in memory).
        device: Where the tables go.

    Raises:
        UserError: A file is missing or damaged, or the quantizer belongs to another model.
    """
    if not path.is_file():
        raise UserError(f"quantizer: no such file: {path}")
    try:
        manifest = QuantizerManifest.model_validate_json(path.read_text(encoding="utf-8"))
        tensors = load_file(tensors_path(path), device=str(device))
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(f"quantizer: {path} is damaged ({first}): build it again") from None
    if weights_sha256 is not None and manifest.weights_sha256 != weights_sha256:
        raise UserError(
            f"quantizer: {path} was built for model '{manifest.model}' "
            f"(weights {manifest.weights_sha256[:12]}), not for weights {weights_sha256[:12]}: "
            "build one for this model"
        )
    layers = [
        LayerQuantizer(*(tensors[f"layers.{i}.{field}"] for field in FIELDS))
        for i in range(manifest.num_layers)
    ]
    return manifest, layers
