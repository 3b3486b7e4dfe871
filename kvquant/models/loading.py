"""Loads models and installs the quantized attention; nothing else in the library does.

Unquantized models are loaded by :mod:`kvquant.models.base_model`.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvquant.cache.attending import AttendingCache, Protocol
from kvquant.cache.codec import Codec
from kvquant.cache.fp16_layer import new_baseline_cache
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.errors import UserError
from kvquant.fetch.file_hashes import FileHashes
from kvquant.fetch.model_manifest import ModelManifest as ModelManifest
from kvquant.fetch.model_manifest import model_files, weight_files
from kvquant.fetch.model_manifest import read_manifest as read_manifest
from kvquant.formats.head_share import HeadShare
from kvquant.models.adapters import AttentionAdapter
from kvquant.models.base_model import default_attention as default_attention
from kvquant.models.base_model import default_dtype as default_dtype
from kvquant.models.base_model import load_base_model as load_base_model
from kvquant.models.base_model import load_tokenizer as load_tokenizer
from kvquant.models.base_model import resolve_device as resolve_device
from kvquant.models.base_model import resolve_devices as resolve_devices
from kvquant.models.base_model import with_manifest
from kvquant.models.hooks import attention_layers as attention_layers
from kvquant.models.hooks import install_attention as install_attention
from kvquant.models.hooks import uninstall_attention as uninstall_attention
from kvquant.models.hooks import unrotated_layers
from kvquant.models.layer_kinds import LayerKinds, layer_kinds
from kvquant.models.layer_kinds import position_limit as position_limit
from kvquant.models.placement import layer_devices
from kvquant.models.prefill_quant import adapter_of
from kvquant.models.rotary import model_rope, one_factor, static_rope
from kvquant.models.tensor_parallel import own_kv_heads, share_heads
from kvquant.models.value_rotation import (
    fold_value_rotation,
    refuse_rotated,
    values_rotated,
)
from kvquant.quantization.quantizer_file import check_scheme, load_quantizer, scheme_of
from kvquant.schemes.registry import CacheFactory, ModelShape, build_caches, build_codecs
from kvquant.study.schemes import Fp16Scheme, SchemeSpec


@dataclass
class QuantizedModel:
    """A model whose attention works with quantized caches.

    Attributes:
        model: The transformers model, called as `model(..., past_key_values=qm.new_cache())`.
        tokenizer: The tokenizer of the model.
        scheme: The scheme of `new_cache`.
        codecs: One codec per layer that sees all tokens, or None for a scheme without codecs.
        caches: Factory of the caches of a scheme with its own kind of cache, else None.
        inputs: Hashes of the files on which results depend, by their role (model, quantizer), which
            records include.
        share: Which of the model's kv heads this process has, with their caches; None: all. Bytes
            and elements of caches are then those of this process alone.
    """

    model: Any
    tokenizer: Any
    scheme: SchemeSpec
    codecs: list[Codec] | None
    caches: CacheFactory | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    share: HeadShare | None = None

    @property
    def quantizes(self) -> bool:
        """Whether the scheme's cache quantizes."""
        return self.scheme.quantizes

    @property
    def device(self) -> torch.device:
        """The device of the inputs, and of the weights if they are all on one."""
        return _embedding(self.model).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations, which may differ from that of quantized weights."""
        return _embedding(self.model).dtype

    @property
    def max_positions(self) -> int:
        """The longest sequence for which the position embedding is made."""
        return int(self.model.config.max_position_embeddings)

    @property
    def position_limit(self) -> int:
        """The longest supported sequence (see :func:`position_limit`)."""
        return position_limit(self.model.config)

    @property
    def adapter(self) -> AttentionAdapter:
        """The adapter of the model's family."""
        return adapter_of(self.model.model.layers[0].self_attn)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes logits from what the decoder gives (see :meth:`AttentionAdapter.logits`)."""
        return self.adapter.logits(self.model, hidden_states)

    @functools.cached_property
    def kinds(self) -> LayerKinds:
        """Which layers see all tokens, and which have a sliding window, kept in 16 bits."""
        return layer_kinds(self.model.model)

    def new_cache(self, protocol: Protocol = "A") -> Any:
        """Makes an empty cache of the scheme (see :class:`KVQuantCache` for the protocols).

        Raises:
            UserError: The scheme cannot be measured under the protocol.
        """
        if protocol not in self.scheme.protocols and protocol in ("A", "B"):
            raise UserError(
                f"protocol {protocol}: impossible for scheme kind '{self.scheme.kind}', whose "
                "first call attends in full precision whatever it stores, so one forward pass "
                "measures nothing; use protocol A with chunks"
            )
        kinds, dim = self.kinds, _kv_shape(self.model)[1]
        static = static_rope(self.model, kinds.full_rope)
        rope = model_rope(self.model, self.adapter, dim, kinds.full_rope)
        unrotated = unrotated_layers([layer.self_attn for layer in self.model.model.layers])
        if self.caches is not None:
            cache = self.caches(protocol, rope)
            if not isinstance(cache, AttendingCache):
                return cache
            if not static:
                raise UserError(
                    f"scheme: '{self.scheme.kind}' rotates keys when it reads them, which a rope "
                    "scaling that changes with the length does not allow"
                )
        elif self.codecs is None:
            return new_baseline_cache(kinds.windows)
        else:
            # Decode kernels have one table for all layers and one factor for all channels.
            one = not unrotated & set(kinds.full) and one_factor(self.model, dim, kinds.full_rope)
            codecs = iter(self.codecs)
            local = None
            if kinds.window_rope != kinds.full_rope:
                local = model_rope(self.model, self.adapter, dim, kinds.window_rope)
            cache = KVQuantCache(
                [next(codecs) if window is None else None for window in kinds.windows],
                rope,
                protocol,
                static_rope=static and one,
                keep_rope=not static,
                window=kinds.window,
                window_rope=local,
                soft_cap=kinds.soft_cap,
            )
        cache.rotary, cache.unrotated = self.model.model.rotary_emb, unrotated
        return cache

    def baseline_cache(self) -> Any:
        """Makes an empty unquantized 16-bit cache for the same model."""
        return new_baseline_cache(self.kinds.windows)


def load_quantized_model(
    model: str | Path | ModelManifest | nn.Module,
    scheme: SchemeSpec | None = None,
    *,
    quantizer: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    tp_plan: str | None = None,
    tokenizer: Any = None,
) -> QuantizedModel:
    """Loads a model with the cache of a scheme, in one call.

    Args:
        model: Directory, hub id, manifest of a fetched model, or a loaded transformers model. A
            loaded model, which may have quantized weights, is set to evaluation mode, and a
            quantizer is checked against its shape alone. For files, the quantizer is checked
            against the hash of the weights.
        scheme: The scheme; None: that of the quantizer, or the unquantized cache without one.
        quantizer: Path of quantizer.json, for schemes that need calibration.
        device: "cpu", "cuda" or "auto".
        dtype: Dtype of the weights; None: see :func:`default_dtype`.
        device_map: Used instead of `device`: the device map of transformers, or a list of GPUs,
            over which the layers are spread evenly by bytes. Layers may be on several GPUs, each
            as a whole on one; the cache of a layer is on the layer's GPU.
        tp_plan: "auto": each of the processes that `torchrun` started loads its part of the model,
            by transformers' plan, and quantizes its own kv heads. A loaded model may have such a
            plan already.
        tokenizer: The tokenizer; None: that of the folder, or none for a loaded model.

    Raises:
        UserError: A file or the architecture does not fit; the message says which one.
    """
    loaded = isinstance(model, nn.Module)
    if loaded and (device != "auto" or (dtype, device_map, tp_plan) != (None, None, None)):
        raise UserError("model: is loaded; move or convert it before it is given, not by options")
    if device_map is not None and device != "auto":
        raise UserError("device_map: says where the model goes; leave device out")
    if not isinstance(model, nn.Module):
        model = with_manifest(model)
    spec = scheme or Fp16Scheme(kind="fp16")
    inputs = {"model": model.identity} if isinstance(model, ModelManifest) else {}
    tables = None
    if quantizer is not None:  # first, because it is the cheapest check
        file, elsewhere = Path(quantizer), loaded or (device_map, tp_plan) != (None, None)
        where = torch.device("cpu") if elsewhere else resolve_device(device)
        sha256 = None if isinstance(model, nn.Module) else _weights_sha256(model)
        info, tables = load_quantizer(file, weights_sha256=sha256, device=where)
        spec = scheme or scheme_of(file, info)
        check_scheme(file, info, spec)
        inputs["quantizer"] = info.tensors_sha256
    base: Any = model
    if isinstance(model, nn.Module):
        model.eval()
    else:
        base, own = load_base_model(
            model, device=device, dtype=dtype, device_map=device_map, tp_plan=tp_plan
        )
        tokenizer = own if tokenizer is None else tokenizer
    layers = attention_layers(base)
    share = share_heads(base, layers, adapter_of(layers[0]).family)
    places, kinds = layer_devices(base), layer_kinds(base.model)
    full = kinds.full
    if tables is not None:
        own = (len(full), *_kv_shape(base))
        if (info.num_layers, info.num_kv_heads, info.head_dim) != own:
            raise UserError(
                f"quantizer: {quantizer} is for {info.num_layers} layers of {info.num_kv_heads} x "
                f"{info.head_dim}, the model has {own[0]} that see all tokens, of {own[1]} x "
                f"{own[2]}"
            )
        tables = [table.to(places[i]) for i, table in zip(full, tables, strict=True)]
    heads, dim = own_kv_heads(base.model), _kv_shape(base)[1]
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


def _weights_sha256(model: str | Path | ModelManifest) -> str | None:
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


def _embedding(model: Any) -> torch.Tensor:
    """Returns the token embeddings: never quantized, and on the device of the inputs."""
    weight: torch.Tensor = model.get_input_embeddings().weight
    return weight


def _kv_shape(model: Any) -> tuple[int, int]:
    """Returns the number of key/value heads of a model and their size."""
    config: Any = model.config
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_key_value_heads), int(dim)
