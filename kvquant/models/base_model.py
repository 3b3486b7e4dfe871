"""Loads unquantized models and tokenizers, never by a folder's own code, and checks their files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from kvquant.errors import UserError
from kvquant.fetch.model_manifest import (
    TOKENIZER_FILES,
    ModelManifest,
    manifest_beside,
    verify_model,
)
from kvquant.models.hooks import refuse_configuration
from kvquant.models.layer_kinds import position_limit
from kvquant.models.placement import spread
from kvquant.models.tensor_parallel import plan_options
from kvquant.study.model_families import MODEL_FAMILIES


def resolve_device(device: str) -> torch.device:
    """Returns the device of a name; 'auto' is the GPU if there is one, else the CPU.

    Raises:
        UserError: The name is unknown, or the GPU does not exist.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device: '{device}' is none of auto, cpu, cuda and cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device: '{device}' asked for, but torch sees no GPU")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device: '{device}' asked for, but torch sees "
            f"{torch.cuda.device_count()} GPU(s), numbered from 0"
        )
    return found


def resolve_devices(devices: Sequence[str | torch.device]) -> list[torch.device]:
    """Returns the devices of names, of which several are different GPUs.

    Raises:
        UserError: A name is unknown, a GPU does not exist, or several are not different GPUs.
    """
    found = [resolve_device(str(device)) for device in devices]
    gpus = {device.index for device in found if device.type == "cuda"} - {None}
    if not found or (len(found) > 1 and len(gpus) < len(found)):
        raise UserError(
            f"device_map: {', '.join(map(str, found)) or 'no device'}: a list names one device, or "
            "different GPUs with their numbers, such as ['cuda:0', 'cuda:1']"
        )
    return found


def _read_pretrained(kind: Any, directory: str | Path, **options: Any) -> Any:
    """Reads a folder or hub id by a transformers class, never by the folder's own code.

    Raises:
        UserError: A file cannot be read; the message says why in one line.
    """
    try:
        # Without this, transformers asks on standard input whether it may run the folder's code.
        return kind.from_pretrained(str(directory), trust_remote_code=False, **options)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Each library that may read a damaged file raises another type of error.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        told = lines[0] if not lines[0].endswith(":") else " ".join(map(str.strip, lines[:2]))
        tried = f"cannot load '{directory}'"
        if not os.path.exists(directory):  # transformers took a mistyped folder for a hub id
            tried = f"'{directory}' is no folder here, and cannot be loaded as a hub id"
        raise UserError(f"model: {tried}: {told}") from None


def load_config(model: str | Path) -> Any:
    """Returns the configuration of a directory or hub id, without its weights.

    Raises:
        UserError: It cannot be read.
    """
    from transformers import AutoConfig

    return _read_pretrained(AutoConfig, model)


def default_dtype(config: Any, device: torch.device, on_gpu: str | None = None) -> torch.dtype:
    """Returns the dtype of the weights with which a model is loaded by default.

    It is fp32 on a CPU. On a GPU it is bf16 for a checkpoint in bf16 or MXFP4, whose activations
    may exceed the range of fp16, and fp16 otherwise.

    Args:
        config: The model's configuration, which names the dtype of the checkpoint.
        device: Where the model goes.
        on_gpu: Name of the dtype that a study asks for on a GPU.
    """
    if device.type == "cpu":
        return torch.float32
    if on_gpu is not None:
        return getattr(torch, on_gpu)
    saved = getattr(config, "dtype", None) or (torch.bfloat16 if _in_mxfp4(config) else None)
    return torch.bfloat16 if saved in (torch.bfloat16, "bfloat16") else torch.float16


def _in_mxfp4(config: Any) -> bool:
    """Returns whether weights of a checkpoint are stored in MXFP4, as the experts of GPT-OSS."""
    stored = getattr(config, "quantization_config", None) or {}
    return bool(stored.get("quant_method") == "mxfp4")


def default_attention(config: Any) -> str:
    """Returns the implementation of attention with which a model is loaded.

    It is torch's, but for families with caps of scores or attention sinks, which torch's kernels do
    not have.
    """
    family = MODEL_FAMILIES.get(config.model_type)
    if family is None:
        return "sdpa"
    return "eager" if family.soft_capping or family.sink_logits is not None else "sdpa"


def _dequantized(config: Any) -> dict[str, Any]:
    """Returns the options of transformers by which weights in MXFP4 become 16-bit weights.

    It has kernels for MXFP4, but only for what it loads on a GPU itself, and they pass no
    gradients. A device map or a plan leaves the choice to it.
    """
    if not _in_mxfp4(config):
        return {}
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


def _all_on_cpu(device_map: Any) -> bool:
    """Returns whether a device map of transformers puts the whole model on the CPU."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return {str(place) for place in places} == {"cpu"}


def load_base_model(
    model: str | Path | ModelManifest,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    tp_plan: str | None = None,
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """Loads model and tokenizer from a directory or hub id, without remote code or pickles.

    Args:
        model: Directory, hub id or manifest. The files of a manifest are verified, and those of a
            directory that `fetch-model` filled.
        device: "cpu", "cuda" or "auto".
        dtype: Dtype of the weights; None: see :func:`default_dtype`.
        device_map: Used instead of `device`: the device map of transformers, or a list of GPUs,
            over which the layers are spread evenly by bytes.
        tp_plan: "auto" for the part of the model that this process has among those that `torchrun`
            started.
        tokenizer: The tokenizer; None: that of the directory or hub id.

    Returns:
        The model in evaluation mode with frozen weights, and its tokenizer.

    Raises:
        UserError: A file is damaged, lacks weights, or differs from the manifest, or the processes
            do not fit the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    listed = isinstance(device_map, list | tuple)
    named = "cpu" if _all_on_cpu(device_map) else device
    devices = resolve_devices(device_map if listed else [named])
    where = devices[0]
    model = with_manifest(model)
    if isinstance(model, ModelManifest):
        verify_model(model)
    directory = model.directory if isinstance(model, ModelManifest) else model
    config = _read_pretrained(AutoConfig, directory)
    refuse_configuration(config)
    asked = model.dtype if isinstance(model, ModelManifest) else None
    kind = dtype or default_dtype(config, where, asked)
    placed = {} if device_map is None or listed else {"device_map": device_map}
    if tp_plan is not None:
        placed = plan_options(config, tp_plan, device, device_map)
    found, info = _read_pretrained(
        AutoModelForCausalLM,
        directory,
        dtype=kind,
        attn_implementation=default_attention(config),
        use_safetensors=True,
        output_loading_info=True,
        **(placed or _dequantized(config)),
    )
    # transformers silently fills these weights with random numbers.
    for key, what in (("missing_keys", "lack"), ("mismatched_keys", "have another shape of")):
        if wrong := sorted(map(str, info[key])):
            raise UserError(
                f"model: cannot load '{directory}': its weights {what} {wrong[0]} "
                f"({len(wrong)} in all)"
            )
    if tokenizer is None:
        tokenizer = _tokenizer(directory)
    found.requires_grad_(False)
    if not placed and _in_mxfp4(config):  # some releases dequantize to bf16 alone
        for parameter in found.parameters():
            if parameter.dtype is torch.bfloat16:
                parameter.data = parameter.data.to(kind)
    return (found if placed else spread(found, devices)).eval(), tokenizer


def load_tokenizer(model: str | Path | ModelManifest) -> tuple[Any, int]:
    """Loads the tokenizer and the longest sequence of a local model without its weights.

    Args:
        model: Directory or manifest; a manifest's files other than the weights are verified.

    Raises:
        UserError: A file cannot be read, or differs from the manifest.
    """
    from transformers import AutoConfig

    model = with_manifest(model)
    if isinstance(model, ModelManifest):
        verify_model(model, weights=False)
    directory = model.directory if isinstance(model, ModelManifest) else model
    config = _read_pretrained(AutoConfig, directory)
    return _tokenizer(directory), position_limit(config)


def _tokenizer(directory: str | Path) -> Any:
    """Returns the tokenizer of a directory or hub id.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return _read_pretrained(AutoTokenizer, directory)
    except UserError:
        folder = Path(directory)
        if not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise
        files = ", ".join(TOKENIZER_FILES)
        raise UserError(f"model: '{folder}' holds no tokenizer ({files}): save it there") from None


def check_tokenizer(tokenizer: Any) -> None:
    """Refuses what cannot turn texts into tokens, such as the name of a tokenizer.

    Raises:
        UserError: It is no tokenizer.
    """
    if not callable(tokenizer):
        raise UserError(
            f"tokenizer: must be a tokenizer, got {type(tokenizer).__name__}; give what "
            "transformers.AutoTokenizer.from_pretrained returns"
        )


def with_manifest(model: str | Path | ModelManifest) -> str | Path | ModelManifest:
    """Returns the manifest of a folder that `fetch-model` filled, else `model` itself.

    Raises:
        UserError: It is neither a folder nor the id of a hub.
    """
    if not isinstance(model, str | os.PathLike | ModelManifest):
        raise UserError(
            "model: must be a folder, a hub id or a loaded transformers model, got "
            f"{type(model).__name__}"
        )
    if not isinstance(model, ModelManifest) and not os.path.isdir(model):
        try:
            validate_repo_id(str(model))
        except HFValidationError:
            raise UserError(f"model: '{model}' is neither a folder nor a hub id") from None
    found = None if isinstance(model, ModelManifest) else manifest_beside(model)
    return model if found is None else found
