"""The files of a quantizer: `quantizer.json` and `quantizer.safetensors`, never a pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kvquant.errors import UserError
from kvquant.fetch.text_overlap import CalibratedText
from kvquant.formats.layer_quantizer import LayerTables
from kvquant.formats.tensor_file import read_info, read_tensors, save_pair
from kvquant.study.dotted import load
from kvquant.study.scheme_kinds import PROMPT_ATTENTION, CalibratedScheme, Scheme
from kvquant.study.schemes import SchemeSpec

FIELD = "quantizer"
AGAIN = "build it again (`kvquant quantize`)"
MAX_LAYERS = 4096


class QuantizerManifest(BaseModel):
    """The manifest of a quantizer: what its tables were built from, and for what.

    Attributes:
        spec: The scheme's options.
        num_layers: Number of layers that see all tokens, the only ones with tables.
        weights_sha256: Of the model's weights; None for a model that was given in memory.
        model_identity: Of all files of the model (see :mod:`kvquant.fetch.model_manifest`).
        text: The text that calibration read; perplexity must not be measured on it.
        logits_sample: Some logits of the model, by which a model in memory is recognized
            (:mod:`kvquant.models.logits_sample`); None in quantizers of the workflow.
        tensors_sha256: Of the safetensors file; set when it is written.
        seal: sha256 of all other fields; set when it is written.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: int = 2
    library_version: str
    model: str
    weights_sha256: str | None
    model_identity: str | None = None
    text: CalibratedText | None = None
    scheme: str
    spec: dict[str, Any]
    calibration: dict[str, Any]
    spec_digest: str
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    calibration_error: dict[str, float]
    logits_sample: list[float] | None = None
    tensors_sha256: str = ""
    seal: str = ""


def tensors_path(manifest: Path) -> Path:
    """Returns the path of the tensor file that belongs to a quantizer.json."""
    return manifest.with_suffix(".safetensors")


def named_tensors(layers: Sequence[LayerTables]) -> dict[str, torch.Tensor]:
    """Returns the tensors of all layers by their names in the safetensors file."""
    return {
        f"layers.{i}.{field}": getattr(layer, field)
        for i, layer in enumerate(layers)
        for field in layer.FIELDS
    }


def save_quantizer(path: Path, manifest: QuantizerManifest, layers: Sequence[LayerTables]) -> None:
    """Writes both files, the JSON last, so that its presence means that both are whole."""
    absent = {"logits_sample"} if manifest.logits_sample is None else None
    info = manifest.model_dump(mode="json", exclude=absent)
    save_pair(path, tensors_path(path), info, named_tensors(layers))


def read_quantizer(path: Path) -> QuantizerManifest:
    """Reads the manifest of a quantizer without its tensors.

    Raises:
        UserError: It is missing, damaged, was edited, or is of an older version.
    """
    raw = read_info(path, FIELD, AGAIN)
    try:
        return QuantizerManifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{FIELD}: {path} is damaged ({where}: {first['msg']}): {AGAIN}") from None


def scheme_of(path: str | Path, manifest: QuantizerManifest) -> CalibratedScheme:
    """Returns the scheme that a quantizer was built for.

    Raises:
        UserError: The manifest names no scheme that takes a quantizer.
    """
    try:
        found: Scheme = TypeAdapter(SchemeSpec).validate_python(manifest.spec)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{FIELD}: {path} is damaged ({where}: {first['msg']}): {AGAIN}") from None
    if not isinstance(found, CalibratedScheme):
        raise UserError(f"{FIELD}: {path} is damaged (kind '{found.kind}' takes none): {AGAIN}")
    return found


def check_scheme(path: str | Path, manifest: QuantizerManifest, scheme: Scheme) -> None:
    """Refuses a quantizer that was built for another scheme.

    Args:
        path: The quantizer, as messages name it.
        manifest: Its manifest.
        scheme: The scheme that is asked for.

    Raises:
        UserError: An option differs; the message names it.
    """
    built = scheme_of(path, manifest)
    # `meaning` lacks options that were added later where they have their default. Tables do not
    # depend on the attention.
    meanings = [spec.meaning(PROMPT_ATTENTION) for spec in (scheme, built)]
    for name in ("kind", *meanings[0], *meanings[1]):
        theirs, ours = (getattr(spec, name, None) for spec in (built, scheme))
        if theirs != ours:
            raise UserError(
                f"{FIELD}: {path} was built for scheme '{manifest.scheme}' with {name}: "
                f"{theirs}, not for {name}: {ours}: build one for this scheme, or leave the scheme "
                "to the file"
            )


def check_digest(path: Path, digest: str) -> QuantizerManifest:
    """Refuses a quantizer that other entries of a study made; returns its manifest.

    Args:
        path: quantizer.json.
        digest: Of model, calibration and scheme (:func:`kvquant.study.digests.quantizer_digest`).

    Raises:
        UserError: It was built from other entries.
    """
    if (found := read_quantizer(path)).spec_digest != digest:
        raise UserError(
            f"--quantizer: {path} was built for scheme '{found.scheme}' of model '{found.model}' "
            f"from other entries of a study than these (digest {found.spec_digest}, not {digest}): "
            "build it again"
        )
    return found


def check_weights(path: str | Path, manifest: QuantizerManifest, sha256: str | None) -> None:
    """Refuses a quantizer that was built for other weights.

    Args:
        path: The quantizer, as messages name it.
        manifest: Its manifest.
        sha256: Hash of the weights at hand; None: unknown, so that nothing is checked.

    Raises:
        UserError: Both hashes are known and differ.
    """
    built = manifest.weights_sha256
    if sha256 is not None and built is not None and built != sha256:
        raise UserError(
            f"{FIELD}: {path} was built for model '{manifest.model}' (weights {built[:12]}), not "
            f"for weights {sha256[:12]}: build one for this model"
        )


def load_quantizer(
    path: Path, *, weights_sha256: str | None, device: torch.device | str = "cpu"
) -> tuple[QuantizerManifest, list[LayerTables]]:
    """Reads a quantizer and checks that it is whole and was built for the model at hand.

    Args:
        path: quantizer.json.
        weights_sha256: Hash of the model's weights; None skips the check (a model in memory).
        device: Where the tables go.

    Raises:
        UserError: A file is missing or damaged, its tables are not those of its JSON, or the
            quantizer belongs to another model.
    """
    manifest = read_quantizer(path)
    check_weights(path, manifest, weights_sha256)
    spec = scheme_of(path, manifest)
    kind: type[LayerTables] = load(spec.registration.tables)
    shapes = kind.shapes(spec.table_bits, manifest.num_kv_heads, manifest.head_dim)
    wanted = {f"layers.{i}.{f}": shapes[f] for i in range(manifest.num_layers) for f in kind.FIELDS}
    file = tensors_path(path)
    tensors = read_tensors(file, manifest.tensors_sha256, wanted, FIELD, AGAIN)
    layers: list[LayerTables] = []
    for i in range(manifest.num_layers):
        layer = kind(**{field: tensors[f"layers.{i}.{field}"] for field in kind.FIELDS})
        if (problem := layer.problem()) is not None:
            raise UserError(f"{FIELD}: {file}: layers.{i}.{problem}: {AGAIN}")
        layers.append(layer.to(device))
    return manifest, layers
