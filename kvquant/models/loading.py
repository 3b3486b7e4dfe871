"""The one place that loads models and installs the quantized attention."""

from __future__ import annotations

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
from kvquant.fetch.model_manifest import manifest_beside, model_files, verify_model, weight_files
from kvquant.fetch.model_manifest import read_manifest as read_manifest
from kvquant.models.hooks import attention_layers as attention_layers
from kvquant.models.hooks import install_attention as install_attention
from kvquant.models.hooks import position_limit as position_limit
from kvquant.models.hooks import uninstall_attention as uninstall_attention
from kvquant.quantization.quantizer_file import check_scheme, load_quantizer, scheme_of
from kvquant.schemes.registry import CacheFactory, ModelShape, build_caches, build_codecs
from kvquant.study.schemes import Fp16Scheme, SchemeSpec


def resolve_device(device: str) -> torch.device:
    """'auto' is the GPU if there is one; asking for a missing GPU is an error."""
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


def _read_pretrained(kind: Any, directory: str | Path, **options: Any) -> Any:
    """What a transformers class makes of a folder or hub id; never the folder's own code.

    Raises:
        UserError: In one line, whatever is wrong with a file.
    """
    try:
        # Left out, transformers asks on standard input whether it may run the folder's code.
        return kind.from_pretrained(str(directory), trust_remote_code=False, **options)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # A damaged file raises a different type in each of the libraries that may read it.
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: cannot load '{directory}': {told}") from None


def default_dtype(config: Any, device: torch.device) -> torch.dtype:
    """Type of the weights that a model is loaded with unless another is asked for.

    fp32 on a CPU; on a GPU 16 bits: bf16 for a checkpoint in bf16, whose activations may exceed
    what fp16 holds, else fp16.
    """
    if device.type == "cpu":
        return torch.float32
    saved = getattr(config, "dtype", None)
    return torch.bfloat16 if saved in (torch.bfloat16, "bfloat16") else torch.float16


def load_base_model(
    model: str | Path | ModelManifest,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
) -> tuple[Any, Any]:
    """Model and tokenizer from a local directory or hub id; never remote code, never a pickle.

    Args:
        model: Directory or hub id; or a manifest, whose files are then verified. So are those of a
            directory that `fetch-model` filled.
        device: "cpu", "cuda" or "auto".
        dtype: Default: see :func:`default_dtype`.
        device_map: As of transformers, in the place of `device`; all layers must come to be on one
            device.

    Returns:
        The model in evaluation mode with frozen weights, and its tokenizer.

    Raises:
        UserError: A file is damaged, lacks weights, or is not the manifest's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = resolve_device(device)
    model = _with_manifest(model)
    if isinstance(model, ModelManifest):
        verify_model(model)
    directory = model.directory if isinstance(model, ModelManifest) else model
    kind = dtype or default_dtype(_read_pretrained(AutoConfig, directory), where)
    placed = {} if device_map is None else {"device_map": device_map}
    found, info = _read_pretrained(
        AutoModelForCausalLM,
        directory,
        dtype=kind,
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
        **placed,
    )
    # transformers fills these with random numbers and goes on.
    for key, what in (("missing_keys", "lack"), ("mismatched_keys", "have another shape of")):
        if wrong := sorted(map(str, info[key])):
            raise UserError(
                f"model: cannot load '{directory}': its weights {what} {wrong[0]} "
                f"({len(wrong)} in all)"
            )
    tokenizer = _read_pretrained(AutoTokenizer, directory)
    found.requires_grad_(False)
    return (found if placed else found.to(where)).eval(), tokenizer


def load_tokenizer(model: str | Path | ModelManifest) -> tuple[Any, int]:
    """The tokenizer of a local model and its longest sequence, without its weights.

    Args:
        model: Directory; or a manifest, whose files other than the weights are then verified.

    Raises:
        UserError: They cannot be read, or are not the manifest's.
    """
    from transformers import AutoConfig, AutoTokenizer

    model = _with_manifest(model)
    if isinstance(model, ModelManifest):
        verify_model(model, weights=False)
    directory = model.directory if isinstance(model, ModelManifest) else model
    config = _read_pretrained(AutoConfig, directory)
    return _read_pretrained(AutoTokenizer, directory), position_limit(config)


@dataclass
class QuantizedModel:
    """A model whose attention works with quantized caches.

    Attributes:
        model: The transformers model; `model(..., past_key_values=qm.new_cache())`.
        tokenizer: Its tokenizer.
        scheme: The scheme of `new_cache`.
        codecs: One codec a layer, or None for a scheme without codecs.
        caches: Makes the caches of a scheme that brings a cache of its own, else None.
        inputs: Hashes of the files that results depend on, by what they are (model, quantizer);
            records hold them.
    """

    model: Any
    tokenizer: Any
    scheme: SchemeSpec
    codecs: list[Codec] | None
    caches: CacheFactory | None = None
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def quantizes(self) -> bool:
        """Whether the scheme's cache quantizes at all."""
        return self.scheme.quantizes

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return _embedding(self.model).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations, which that of quantized weights is not."""
        return _embedding(self.model).dtype

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
        static = _static_rope(self.model)
        if self.caches is not None:
            cache = self.caches(protocol, self._rope)
            if isinstance(cache, AttendingCache) and not static:
                raise UserError(
                    f"scheme: '{self.scheme.kind}' rotates keys when it reads them, which a rope "
                    "scaling that changes with the length does not allow"
                )
            if isinstance(cache, AttendingCache):
                cache.rotary = self.model.model.rotary_emb
            return cache
        if self.codecs is None:
            return new_baseline_cache()
        cache = KVQuantCache(
            self.codecs, self._rope, protocol, static_rope=static, keep_rope=not static
        )
        cache.rotary = self.model.model.rotary_emb
        return cache

    def baseline_cache(self) -> Any:
        """An empty unquantized 16-bit cache for the same model."""
        return new_baseline_cache()


def load_quantized_model(
    model: str | Path | ModelManifest | nn.Module,
    scheme: SchemeSpec | None = None,
    *,
    quantizer: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    tokenizer: Any = None,
) -> QuantizedModel:
    """Loads a model with the cache of a scheme, in one call.

    Args:
        model: Directory, hub id, or the manifest of a fetched model (then the quantizer is checked
            against the weights' hash); or a loaded transformers model, which is taken as it is,
            with quantized weights too, and set to evaluation mode (a quantizer is then checked
            against its shape alone).
        scheme: The scheme; None is the quantizer's, or the unquantized cache without one.
        quantizer: quantizer.json, for schemes that need calibration.
        device: "cpu", "cuda" or "auto".
        dtype: Default: fp32 on a CPU; on a GPU bf16 for a checkpoint in bf16, else fp16.
        device_map: As of transformers, in the place of `device`; all layers must come to be on one
            device.
        tokenizer: Of a loaded model; None takes the folder's, or none for a loaded model.

    Raises:
        UserError: A file or the architecture does not fit; the message says which.
    """
    loaded = isinstance(model, nn.Module)
    if loaded and (device != "auto" or dtype is not None or device_map is not None):
        raise UserError("model: is loaded; move or convert it before it is given, not by options")
    if device_map is not None and device != "auto":
        raise UserError("device_map: says where the model goes; leave device out")
    if not isinstance(model, nn.Module):
        model = _with_manifest(model)
    spec = scheme or Fp16Scheme(kind="fp16")
    inputs = {"model": model.identity} if isinstance(model, ModelManifest) else {}
    tables = None
    if quantizer is not None:  # first: the cheapest check
        file, elsewhere = Path(quantizer), loaded or device_map is not None
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
        base, own = load_base_model(model, device=device, dtype=dtype, device_map=device_map)
        tokenizer = own if tokenizer is None else tokenizer
    layers = attention_layers(base)
    where = _one_device(base)
    if tables is not None:
        shape = (len(layers), *_kv_shape(base))
        if (info.num_layers, info.num_kv_heads, info.head_dim) != shape:
            raise UserError(
                f"quantizer: {quantizer} is for {info.num_layers} layers of {info.num_kv_heads} x "
                f"{info.head_dim}, the model has {shape[0]} of {shape[1]} x {shape[2]}"
            )
        tables = [table.to(where) for table in tables]
    heads, dim = _kv_shape(base)
    codecs = build_codecs(spec, len(layers), tables)
    for codec in codecs or []:
        codec.check_model(heads, dim)
    caches = build_caches(spec, ModelShape(len(layers), heads, dim), tables)
    install_attention(base)
    return QuantizedModel(base, tokenizer, spec, codecs, caches, inputs)


def _with_manifest(model: str | Path | ModelManifest) -> str | Path | ModelManifest:
    """The manifest in place of a folder that `fetch-model` filled."""
    found = None if isinstance(model, ModelManifest) else manifest_beside(model)
    return model if found is None else found


def _weights_sha256(model: str | Path | ModelManifest) -> str | None:
    """Hash of a model's weights; None for one that is not a folder of safetensors."""
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
    """Weights of the token embeddings, which are where inputs go and are not quantized."""
    weight: torch.Tensor = model.get_input_embeddings().weight
    return weight


def _one_device(model: Any) -> torch.device:
    """Where a model is.

    Raises:
        UserError: Its layers are on several devices, or offloaded.
    """
    found = {p.device for p in model.model.parameters()}
    if len(found) > 1 or any(device.type == "meta" for device in found):
        raise UserError(
            f"device_map: the model is on {', '.join(sorted(map(str, found)))}; the quantized "
            "cache needs all of it on one device (meta: weights that are offloaded)"
        )
    return next(iter(found))


def _static_rope(model: Any) -> bool:
    """Whether a position's rotation is the same in calls of any length."""
    kind = str(getattr(model.model.rotary_emb, "rope_type", "default"))
    return "dynamic" not in kind and kind != "longrope"


def _kv_shape(model: Any) -> tuple[int, int]:
    """(num_kv_heads, head_dim) of a model."""
    config: Any = model.config
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_key_value_heads), int(dim)
