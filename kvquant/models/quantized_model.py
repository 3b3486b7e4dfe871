"""A model with the cache of a scheme, and the way back to the model as it was."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from kvquant.cache.attending import AttendingCache, Protocol
from kvquant.cache.codec import Codec
from kvquant.cache.fp16_layer import new_baseline_cache
from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.errors import UserError
from kvquant.formats.head_share import HeadShare
from kvquant.models.adapters import AttentionAdapter
from kvquant.models.hooks import uninstall_attention, unrotated_layers
from kvquant.models.layer_kinds import LayerKinds, layer_kinds, position_limit
from kvquant.models.prefill_quant import adapter_of
from kvquant.models.rotary import model_rope, one_factor, static_rope
from kvquant.models.value_rotation import values_rotated
from kvquant.schemes.registry import CacheFactory
from kvquant.study.schemes import SchemeSpec


@dataclass
class QuantizedModel:
    """A model whose attention works with quantized caches.

    :func:`kvquant.load` makes it. As a context manager, it gives a model that was in memory before
    its own attention back at the end: `with kvquant.load(model, scheme="kivi-4") as qm: ...`.

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

    @property
    def approximates(self) -> bool:
        """Whether results may differ from those of the unquantized cache, by the cache or not."""
        return not self.scheme.exact

    def new_cache(self, protocol: Protocol = "A") -> Any:
        """Makes an empty cache of the scheme (see :class:`KVQuantCache` for the protocols).

        Its prompts attend as the scheme says (`prompt_attention`).

        Raises:
            UserError: The scheme cannot be measured under the protocol.
        """
        cache = self._empty_cache(protocol)
        cache.prompt_attention = self.scheme.prompt_attention
        return cache

    def _empty_cache(self, protocol: Protocol) -> Any:
        """Makes the cache of :meth:`new_cache`."""
        if protocol not in self.scheme.protocols and protocol in ("A", "B"):
            raise UserError(
                f"protocol {protocol}: impossible for scheme kind '{self.scheme.kind}', whose "
                "first call attends in full precision whatever it stores, so one forward pass "
                "measures nothing; use protocol A with chunks"
            )
        kinds, dim = self.kinds, kv_shape(self.model)[1]
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

    def unwrap(self) -> Any:
        """Gives the model its own attention back, for use without this library.

        Its weights were never changed and are as they were before :func:`kvquant.load`; the model
        stays in evaluation mode. Caches of :meth:`new_cache` no longer work with it. Another call
        changes nothing. Each :class:`QuantizedModel` of the same model is unwrapped with it.

        Returns:
            The model.

        Raises:
            UserError: The model was read from files for allocated codes, so that the rotation of
                values is folded into its weights, which are therefore not those of its files.
        """
        if values_rotated(self.model):
            raise UserError(
                "model: was read from files, and its values are rotated for allocated codes: load "
                "it again without kvquant, or give kvquant.load a model in memory, whose weights "
                "stay"
            )
        uninstall_attention(self.model)
        return self.model

    def __enter__(self) -> QuantizedModel:
        return self

    def __exit__(self, *error: object) -> None:
        """Unwraps the model, unless rotated values keep it from being used otherwise anyway."""
        if not values_rotated(self.model):
            self.unwrap()

    def baseline_cache(self) -> Any:
        """Makes an empty unquantized 16-bit cache for the same model, with 16-bit attention."""
        cache = new_baseline_cache(self.kinds.windows)
        cache.prompt_attention = "16-bit"
        return cache


def unwrap(qm: QuantizedModel) -> Any:
    """Gives a model its own attention back, and returns it (see :meth:`QuantizedModel.unwrap`).

    Args:
        qm: What :func:`kvquant.load` returned.

    Raises:
        UserError: It is no such thing, or the weights are those of rotated values.
    """
    return as_loaded(qm).unwrap()


def as_loaded(qm: Any) -> QuantizedModel:
    """Returns what :func:`kvquant.load` returned, and refuses anything else.

    Raises:
        UserError: It is a transformers model or the name of one, for instance.
    """
    if not isinstance(qm, QuantizedModel):
        raise UserError(
            f"qm: must be what kvquant.load returned, got {type(qm).__name__}; load the model first"
        )
    return qm


def _embedding(model: Any) -> torch.Tensor:
    """Returns the token embeddings: never quantized, and on the device of the inputs."""
    weight: torch.Tensor = model.get_input_embeddings().weight
    return weight


def kv_shape(model: Any) -> tuple[int, int]:
    """Returns the number of key/value heads of a model and their size."""
    config: Any = model.config
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_key_value_heads), int(dim)
