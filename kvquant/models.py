"""The one place that loads models and installs the quantized attention."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvquant.baseline_cache import new_baseline_cache
from kvquant.cache import KVQuantCache, Protocol
from kvquant.cache_interface import AttendingCache
from kvquant.config import Fp16Scheme, SchemeSpec
from kvquant.errors import UserError
from kvquant.prefill_quant import SUPPORTED, PrefillQuantizedAttention
from kvquant.quantizer_file import load_quantizer
from kvquant.schemes.base import Codec
from kvquant.schemes.registry import CacheFactory, ModelShape, build_caches, build_codecs


@dataclass(frozen=True)
class ModelManifest:
    """A fetched model: its name, origin, the hash of its weights and its directory."""

    model: str
    source: str
    revision: str | None
    weights_sha256: str
    directory: Path


def read_manifest(path: str | Path) -> ModelManifest:
    """Reads `manifest.json` as written by `kvquant fetch-model`."""
    file = Path(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        directory = Path(raw["directory"])
        return ModelManifest(
            model=raw["model"],
            source=raw["source"],
            revision=raw.get("revision"),
            weights_sha256=raw["weights_sha256"],
            directory=directory if directory.is_absolute() else (file.parent / directory),
        )
    except FileNotFoundError:
        raise UserError(f"--model-manifest: no such file: {file}") from None
    except (KeyError, ValueError) as error:
        raise UserError(f"--model-manifest: {file} is damaged ({error}): fetch it again") from None


def resolve_device(device: str) -> torch.device:
    """'auto' is the GPU if there is one; asking for a missing GPU is an error."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device: '{device}' asked for, but torch sees no GPU")
    return torch.device(device)


def load_base_model(
    directory: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer from a local directory or hub id; never remote code.

    Args:
        directory: Directory or hub id.
        device: "cpu", "cuda" or "auto".
        dtype: Default: fp32 on a CPU, fp16 on a GPU.

    Returns:
        The model in evaluation mode with frozen weights, and its tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = resolve_device(device)
    kind = dtype or (torch.float32 if where.type == "cpu" else torch.float16)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=kind, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise UserError(f"model: cannot load '{directory}': {str(error).splitlines()[0]}") from None
    model.requires_grad_(False)
    return model.to(where).eval(), tokenizer


def load_tokenizer(directory: str | Path) -> tuple[Any, int]:
    """The tokenizer of a local model and its longest sequence, without its weights.

    Raises:
        UserError: They cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(str(directory))
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise UserError(f"model: cannot load '{directory}': {str(error).splitlines()[0]}") from None
    return tokenizer, position_limit(config)


def position_limit(config: Any) -> int:
    """Longest sequence that is not refused: more than the positions where RoPE is scaled.

    Some configurations state the scaled length as `max_position_embeddings`, others the one
    that the factor multiplies; the larger reading counts.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    positions = int(config.max_position_embeddings)
    base = int(rope.get("original_max_position_embeddings") or positions)
    return max(positions, int(base * float(rope.get("factor") or 1.0)))


def attention_layers(model: Any) -> list[Any]:
    """The self-attention modules in order, unwrapped; refuses what is not supported.

    Raises:
        UserError: The architecture or an attention kind is not supported.
    """
    found: list[Any] = []
    for layer in model.model.layers:
        module = layer.self_attn
        module = module.original if isinstance(module, PrefillQuantizedAttention) else module
        name = type(module).__name__
        if name not in SUPPORTED:
            raise UserError(
                f"model: attention '{name}' is not supported; supported: " + ", ".join(SUPPORTED)
            )
        if getattr(module, "sliding_window", None) is not None or (
            name == "MistralAttention" and getattr(model.config, "sliding_window", None) is not None
        ):
            raise UserError(
                f"model: layer {len(found)} uses sliding-window attention, which the "
                "quantized cache does not support"
            )
        found.append(module)
    return found


@torch.compiler.disable(reason="looks at the mask on the host, once a forward call")
def _announce_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before each forward of the decoder: tells the cache which columns are tokens."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, AttendingCache):
        return
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds", args[0] if args else None)
    if inputs is None:
        raise ValueError("input_ids: missing")
    mask = kwargs.get("attention_mask")
    cache.begin_forward(inputs.shape[0], inputs.shape[1], mask, inputs.device)


def install_attention(model: Any) -> None:
    """Wraps every attention module once; harmless for other caches."""
    attention_layers(model)
    decoder = model.model
    for layer in decoder.layers:
        if not isinstance(layer.self_attn, PrefillQuantizedAttention):
            layer.self_attn = PrefillQuantizedAttention(layer.self_attn)
    if not getattr(decoder, "_kvquant_hook", False):
        decoder.register_forward_pre_hook(_announce_mask, with_kwargs=True)
        decoder._kvquant_hook = True


@dataclass
class QuantizedModel:
    """A model whose attention works with quantized caches.

    Attributes:
        model: The transformers model; `model(..., past_key_values=qm.new_cache())`.
        tokenizer: Its tokenizer.
        scheme: The scheme of `new_cache`.
        codecs: One codec a layer, or None for a scheme without codecs.
        caches: Makes the caches of a scheme that brings a cache of its own, else None.
    """

    model: Any
    tokenizer: Any
    scheme: SchemeSpec
    codecs: list[Codec] | None
    caches: CacheFactory | None = None

    @property
    def quantizes(self) -> bool:
        """Whether the scheme's cache quantizes at all."""
        return self.scheme.quantizes

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def max_positions(self) -> int:
        """Longest sequence the position embedding is made for."""
        return int(self.model.config.max_position_embeddings)

    @property
    def position_limit(self) -> int:
        """Longest sequence that is not refused (see :func:`position_limit`)."""
        return position_limit(self.model.config)

    def _rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotary = self.model.model.rotary_emb
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        return rotary(like, positions)

    def new_cache(self, protocol: Protocol = "A") -> Any:
        """An empty cache of the scheme (see :class:`KVQuantCache` for the protocols).

        Raises:
            UserError: The scheme cannot be measured under the protocol.
        """
        if protocol not in self.scheme.protocols and protocol in ("A", "B"):
            raise UserError(
                f"protocol {protocol}: impossible for scheme kind '{self.scheme.kind}', whose "
                "first call attends in full precision whatever it stores, so one forward pass "
                "measures nothing; use protocol A with chunks"
            )
        if self.caches is not None:
            return self.caches(protocol, self._rope)
        if self.codecs is None:
            return new_baseline_cache()
        # Dynamic scaling turns all past keys anew when a sequence grows.
        kind = str(getattr(self.model.model.rotary_emb, "rope_type", "default"))
        static = "dynamic" not in kind and kind != "longrope"
        return KVQuantCache(self.codecs, self._rope, protocol, static_rope=static)

    def baseline_cache(self) -> Any:
        """An empty unquantized 16-bit cache for the same model."""
        return new_baseline_cache()


def load_quantized_model(
    model: str | Path | ModelManifest,
    scheme: SchemeSpec | None = None,
    *,
    quantizer: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> QuantizedModel:
    """Loads a model with the cache of a scheme, in one call.

    Args:
        model: Directory, hub id, or the manifest of a fetched model (then the quantizer is checked
            against the weights' hash).
        scheme: The scheme; None is the unquantized cache.
        quantizer: quantizer.json, for schemes that need calibration.
        device: "cpu", "cuda" or "auto".
        dtype: Default: fp32 on a CPU, fp16 on a GPU.

    Raises:
        UserError: A file or the architecture does not fit; the message says which.
    """
    spec = scheme or Fp16Scheme(kind="fp16")
    manifest = model if isinstance(model, ModelManifest) else None
    directory = manifest.directory if manifest else model
    base, tokenizer = load_base_model(str(directory), device=device, dtype=dtype)
    where = next(base.parameters()).device
    layers = attention_layers(base)
    tables = None
    if quantizer is not None:
        expected = manifest.weights_sha256 if manifest else None
        info, tables = load_quantizer(Path(quantizer), weights_sha256=expected, device=where)
        shape = (len(layers), *_kv_shape(base))
        if (info.num_layers, info.num_kv_heads, info.head_dim) != shape:
            raise UserError(
                f"quantizer: {quantizer} is for {info.num_layers} layers of {info.num_kv_heads} x "
                f"{info.head_dim}, the model has {shape[0]} of {shape[1]} x {shape[2]}"
            )
    heads, dim = _kv_shape(base)
    codecs = build_codecs(spec, len(layers), tables)
    for codec in codecs or []:
        codec.check_model(heads, dim)
    caches = build_caches(spec, ModelShape(len(layers), heads, dim), tables)
    install_attention(base)
    return QuantizedModel(base, tokenizer, spec, codecs, caches)


def _kv_shape(model: Any) -> tuple[int, int]:
    """(num_kv_heads, head_dim) of a model."""
    config: Any = model.config
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_key_value_heads), int(dim)
