"""Writes the card of a quantizer: the README.md that lies beside its files and that hubs show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvquant.fetch.hub import is_repository_id
from kvquant.formats.files import replace
from kvquant.quantization.quantizer_file import QuantizerManifest
from kvquant.study.scheme_kinds import CalibratedScheme

NAME = "README.md"
# A card without this line was written by its user, and is left as it is.
MARK = "<!-- Written by kvquant: remove this line to keep your own changes. -->"


def card(manifest: QuantizerManifest, spec: CalibratedScheme, repository: str | None) -> str:
    """Returns the text of a card: the model, the scheme, its bits and the calibration.

    Args:
        manifest: The quantizer's manifest.
        spec: The quantizer's scheme.
        repository: Id of the hub repository that the card is for; None: a folder.
    """
    from huggingface_hub import ModelCardData

    of_hub = is_repository_id(manifest.model)
    data = ModelCardData(
        base_model=manifest.model if of_hub else None,
        library_name="kvquant",
        tags=["kv-cache", "quantization"],
    )
    options = json.dumps(spec.meaning(), sort_keys=True)
    heads = f"{manifest.num_kv_heads} key/value heads of {manifest.head_dim} channels"
    weights = manifest.weights_sha256 or "given in memory"
    rows = {
        "model": f"`{manifest.model}`",
        "weights (sha256)": f"`{weights}`",
        "scheme": f"{spec.title(manifest.scheme)} (`{manifest.scheme}`)",
        "options": f"`{options}`",
        "bits": _bits(spec),
        "layers": f"{manifest.num_layers} that see all tokens, {heads}",
        "calibration": _calibration(manifest.calibration, manifest),
        "made by": f"kvquant {manifest.library_version}",
    }
    model = manifest.model if of_hub else f"FOLDER OF {manifest.model}"
    lines = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# Quantizer of the KV cache of {manifest.model}",
        "Key ranges, widths and codebooks for a quantized KV cache; the model's weights are not "
        "here. It fits the weights that it was built for, and is refused with others.",
        "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]),
        "```python\nimport kvquant\n\n"
        f'qm = kvquant.load("{model}", quantizer="{repository or "FOLDER OF THIS FILE"}")\n'
        'print(kvquant.generate(qm, ["What is a KV cache?"], max_new_tokens=64))\n```',
    ]
    return "\n\n".join(lines) + "\n"


def write_card(folder: Path, text: str) -> None:
    """Writes a card into a folder, unless the folder has one that its user wrote."""
    file = folder / NAME
    if not file.exists() or is_own(file.read_text(encoding="utf-8", errors="replace")):
        replace(file, text)


def is_own(text: str) -> bool:
    """Returns whether a card was written by :func:`card` and not changed by its user since."""
    return MARK in text


def _bits(spec: CalibratedScheme) -> str:
    """Returns what the option `bits` says, with its meaning."""
    meaning = type(spec).model_fields["bits"].description
    return f"{spec.bits:g} ({meaning})"


def _calibration(options: dict[str, Any], manifest: QuantizerManifest) -> str:
    """Returns the windows, seed and text of a calibration in words."""
    found = f"{options.get('windows')} windows of {options.get('window')} tokens"
    found += f", seed {options.get('seed')}"
    if manifest.text is None:
        return found
    text = manifest.text
    what = "given texts" if text.dataset == "texts" else f"'{text.dataset}'"
    return f"{found}, from {text.until:,} characters of {what} (sha256 `{text.sha256[:12]}`)"
