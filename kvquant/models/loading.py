"""Loads models and installs the quantized attention; nothing else in the library does.

Unquantized models are loaded by :mod:`kvquant.models.base_model`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvquant.errors import UserError
from kvquant.fetch.file_hashes import FileHashes
from kvquant.fetch.model_manifest import ModelManifest as ModelManifest
from kvquant.fetch.model_manifest import model_files, weight_files
from kvquant.fetch.model_manifest import read_manifest as read_manifest
from kvquant.models.base_model import check_tokenizer, with_manifest
from kvquant.models.base_model import default_attention as default_attention
from kvquant.models.base_model import default_dtype as default_dtype
from kvquant.models.base_model import load_base_model as load_base_model
from kvquant.models.base_model import load_tokenizer as load_tokenizer
from kvquant.models.base_model import resolve_device as resolve_device
from kvquant.models.base_model import resolve_devices as resolve_devices
from kvquant.models.hooks import attention_layers as attention_layers
from kvquant.models.hooks import install_attention as install_attention
from kvquant.models.hooks import uninstall_attention as uninstall_attention
from kvquant.models.layer_kinds import layer_kinds
from kvquant.models.layer_kinds import position_limit as position_limit
from kvquant.models.logits_sample import check_sample
from kvquant.models.placement import layer_devices
from kvquant.models.prefill_quant import adapter_of
from kvquant.models.prompt_attention import PromptAttention, refuse_model, with_prompt_attention
from kvquant.models.quantized_model import QuantizedModel as QuantizedModel
from kvquant.models.quantized_model import kv_shape
from kvquant.models.tensor_parallel import own_kv_heads, share_heads
from kvquant.models.value_rotation import (
    fold_value_rotation,
    refuse_rotated,
    values_rotated,
)
from kvquant.quantization.quantizer import Quantizer
from kvquant.quantization.quantizer_file import check_scheme, check_weights
from kvquant.schemes.registry import ModelShape, build_caches, build_codecs
from kvquant.study.presets import scheme_from
from kvquant.study.schemes import Fp16Scheme, SchemeSpec


def load(
    model: str | Path | ModelManifest | nn.Module,
    scheme: SchemeSpec | str | Mapping[str, Any] | None = None,
    *,
    quantizer: Quantizer | str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    tp_plan: str | None = None,
    tokenizer: Any = None,
    prompt_attention: PromptAttention | None = None,
) -> QuantizedModel:
    """Loads a model with the cache of a scheme, in one call.

    A model in memory keeps its weights, and :func:`kvquant.unwrap` gives it its own attention back.
    For allocated codes, the weights of a model from files get the rotation of values folded into
    them, which costs tokens nothing and changes logits by rounding alone.

    Args:
        model: Directory, hub id, manifest of a fetched model, or a loaded transformers model, which
            may have quantized weights and is set to evaluation mode.
        scheme: A short name such as "kivi-4" (:func:`kvquant.scheme_presets` lists them), options
            as in a study (`{"kind": "kivi", "bits": 4}`), or a scheme; None: that of the quantizer,
            or the unquantized cache without one.
        quantizer: What :func:`kvquant.calibrate` returned, a folder or hub id of a saved one, or
            the path of a quantizer.json, for schemes that need calibration. It must fit the model:
            the hash of a folder's weights, and a sample of the logits of a model in memory or from
            a hub, if the quantizer has one; shapes always.
        device: "cpu", "cuda" or "auto".
        dtype: Dtype of the weights; None: see :func:`default_dtype`.
        device_map: Used instead of `device`: the device map of transformers, or a list of GPUs,
            over which the layers are spread evenly by bytes. Layers may be on several GPUs, each
            as a whole on one; the cache of a layer is on the layer's GPU.
        tp_plan: "auto": each of the processes that `torchrun` started loads its part of the model,
            by transformers' plan, and quantizes its own kv heads. A loaded model may have such a
            plan already.
        tokenizer: The tokenizer; None: that of the folder, or none for a loaded model.
        prompt_attention: "8-bit": calls with many new columns over caches of this model attend with
            8-bit products, with any scheme; "16-bit": none does; None: as the scheme says, which is
            16-bit where it says nothing.

    Raises:
        UserError: A file or the architecture does not fit; the message says which one.
    """
    loaded = isinstance(model, nn.Module)
    if loaded and (device != "auto" or (dtype, device_map, tp_plan) != (None, None, None)):
        raise UserError("model: is loaded; move or convert it before it is given, not by options")
    if device_map is not None and device != "auto":
        raise UserError("device_map: says where the model goes; leave device out")
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    if not isinstance(model, nn.Module):
        model = with_manifest(model)
    asked = None if scheme is None else scheme_from(scheme)
    spec = asked or Fp16Scheme(kind="fp16")
    inputs = {"model": model.identity} if isinstance(model, ModelManifest) else {}
    sha256 = None
    if quantizer is not None:  # first, because it is the cheapest check
        if not isinstance(quantizer, Quantizer):
            quantizer = Quantizer.from_pretrained(quantizer)
        sha256 = None if isinstance(model, nn.Module) else weights_sha256(model)
        check_weights(quantizer.source, quantizer.manifest, sha256)
        spec = asked or quantizer.scheme
        check_scheme(quantizer.source, quantizer.manifest, spec)
        inputs["quantizer"] = quantizer.tensors_sha256
    spec = with_prompt_attention(spec, prompt_attention, model)
    base: Any = model
    if isinstance(model, nn.Module):
        model.eval()
    else:
        base, tokenizer = load_base_model(
            model,
            device=device,
            dtype=dtype,
            device_map=device_map,
            tp_plan=tp_plan,
            tokenizer=tokenizer,
        )
    layers = attention_layers(base)
    share = share_heads(base, layers, adapter_of(layers[0]).family)
    places, kinds = layer_devices(base), layer_kinds(base.model)
    full = kinds.full
    if spec.prompt_attention == "8-bit":
        refuse_model(kinds, base.config)
    tables = None
    if quantizer is not None:
        info, own = quantizer.manifest, (len(full), *kv_shape(base))
        if (info.num_layers, info.num_kv_heads, info.head_dim) != own:
            raise UserError(
                f"quantizer: {quantizer.source} is for {info.num_layers} layers of "
                f"{info.num_kv_heads} x {info.head_dim}, the model has {own[0]} that see all "
                f"tokens, of {own[1]} x {own[2]}"
            )
        if None in (sha256, info.weights_sha256):  # hashes tell more, where there are two
            check_sample(quantizer.source, info.logits_sample, base)
        tables = [table.to(places[i]) for i, table in zip(full, quantizer.layers, strict=True)]
    heads, dim = own_kv_heads(base.model), kv_shape(base)[1]
    if not full and spec.quantizes:
        tables = tables or []  # no calibration could make any
        warnings.warn(
            "model: all layers have a sliding window (sliding_window: "
            f"{kinds.window}), which is kept in 16 bits: scheme kind "
            f"'{spec.kind}' quantizes nothing",
            stacklevel=2,
        )
    codecs = build_codecs(spec, len(full), tables, share)
    for codec in codecs or []:
        codec.check_model(heads, dim)
    if codecs and codecs[0].rotates_values:
        # A model that was given as an object belongs to the caller, who may use it otherwise.
        if values_rotated(base) or (not loaded and fold_value_rotation(base, layers, dim)):
            for codec in codecs:
                codec.expect_rotated_values()
    elif spec.quantizes:
        refuse_rotated(base, f"scheme kind '{spec.kind}'")
    shape = ModelShape(len(layers), heads, dim, kinds.windows, kinds.soft_cap)
    caches = build_caches(spec, shape, tables)
    install_attention(base)
    return QuantizedModel(base, tokenizer, spec, codecs, caches, inputs, share)


load_quantized_model = load  # the longer name, which came first


def weights_sha256(model: str | Path | ModelManifest) -> str | None:
    """Returns the hash of a model's weights, or None without a folder of safetensors."""
    if isinstance(model, ModelManifest):
        return model.weights_sha256
    folder = Path(model)
    names = weight_files(model_files(folder)) if folder.is_dir() else []
    if not names:
        return None
    hashes = FileHashes(folder, "model")
    found, _ = hashes.of_all(names)
    hashes.remember()
    return found
