"""Installs the attention and the hooks that let a transformers model use quantized caches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kvquant.errors import UserError
from kvquant.models.graph_calls import graph_calls, no_graph_calls
from kvquant.models.layer_kinds import layer_kinds, position_limit
from kvquant.models.model_call import CACHE_NAMES, arguments, find_cache, parameters, refuse_unknown
from kvquant.models.obstacles import (
    attention_obstacles,
    layer_obstacle,
    refused_features,
    unsupported_attention,
    unsupported_configuration,
    unsupported_model,
    wrong_implementation,
)
from kvquant.models.prefill_quant import PrefillQuantizedAttention, adapter_of, original_class
from kvquant.models.prompt_attention import choose, restore
from kvquant.models.rotary import same_angles
from kvquant.models.tensor_parallel import own_kv_heads
from kvquant.study.model_families import family_of_attention

# Arguments of a decoder that are supported, or that do not affect its attention.
_KNOWN = frozenset({
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", *CACHE_NAMES, "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
})  # fmt: skip

Arguments = dict[str, Any]


def attention_layers(model: Any) -> list[Any]:
    """Returns the self-attention modules in order and refuses unsupported ones.

    Raises:
        UserError: The architecture or an attention kind is not supported.
    """
    found: list[Any] = []
    if (problem := unsupported_model(model)) is not None:
        raise UserError(problem)
    for number, layer in enumerate(model.model.layers):
        if (problem := layer_problem(model, layer, number)) is not None:
            raise UserError(problem)
        found.append(layer.self_attn)
    layer_kinds(model.model)
    return found


def layer_problem(model: Any, layer: nn.Module, number: int) -> str | None:
    """Returns the error for a layer whose attention does not work with quantized caches, or None.

    Args:
        model: The model.
        layer: The layer of its decoder.
        number: The layer's index.
    """
    if (problem := layer_obstacle(layer, number)) is not None:
        return problem
    module: Any = layer.self_attn
    name = original_class(module).__name__
    family = family_of_attention(name)
    if obstacles := list(attention_obstacles(module, model.config, family)):
        return refused_features(number, obstacles)
    if family is None:
        return unsupported_attention(name)
    return wrong_implementation(module, model.config, family)


def refuse_configuration(config: Any) -> None:
    """Refuses a configuration whose weights transformers cannot load as models are loaded here.

    That error would not name the obstacle. The model is made without memory for its weights.

    Raises:
        UserError: The architecture or an attention kind is not supported.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if (problem := unsupported_configuration(config)) is not None:
        raise UserError(problem)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or getattr(kind, "_supports_sdpa", True):
        return
    with torch.device("meta"):
        attention_layers(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def unrotated_layers(attentions: list[Any]) -> frozenset[int]:
    """Returns the indices of the attention modules without RoPE."""
    found = enumerate(attentions)
    return frozenset(i for i, module in found if not adapter_of(module).rotates(module))


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    return arguments(parameters(type(module).forward), args, kwargs)


def _inputs(given: Arguments) -> torch.Tensor | None:
    """Returns the token ids or embeddings among the arguments."""
    ids: torch.Tensor | None = given.get("input_ids")
    embeds: torch.Tensor | None = given.get("inputs_embeds")
    return embeds if ids is None else ids


def _check_model(cache: Any, decoder: Any) -> None:
    """Refuses a cache of another model, whose keys would be rotated by other angles.

    Raises:
        UserError: The models have different layers, heads or rotary embeddings.
    """
    layers, rotary = len(cache.layers), decoder.rotary_emb
    if layers != len(decoder.layers):
        raise UserError(
            f"cache: has {layers} layers and the model {len(decoder.layers)}; take a new_cache() "
            "of this model"
        )
    if cache.rotary is rotary:
        return
    if cache.rotary is not None or not cache.columns:
        _check_kinds(cache, decoder)
    if cache.rotary is None:
        return
    unrotated = unrotated_layers([layer.self_attn for layer in decoder.layers])
    if cache.unrotated != unrotated or not same_angles(cache.rotary, rotary):
        raise UserError(
            "cache: was made for a model with another rotary embedding; take a new_cache() of this "
            "model"
        )
    shape = own_kv_heads(decoder), decoder.layers[0].self_attn.head_dim
    try:
        for codec in (getattr(layer, "codec", None) for layer in cache.layers):
            if codec is not None:
                codec.check_model(*shape)
    except UserError as error:
        told = str(error).partition(";")[0]  # without the fix, which is another here
        raise UserError(
            f"cache: was made for another model ({told}); take a new_cache() of this model"
        ) from None
    cache.rotary = rotary  # so that the angles are compared once only


def _check_kinds(cache: Any, decoder: Any) -> None:
    """Refuses a cache whose layers are not of the decoder's kinds.

    Raises:
        UserError: A layer has another sliding window, or scores are capped otherwise.
    """
    kinds = layer_kinds(decoder)
    windows = tuple(getattr(layer, "window", None) for layer in cache.layers)
    for name, same in (
        ("sliding_window", windows == kinds.windows),
        ("attn_logit_softcapping", cache.soft_cap == kinds.soft_cap),
    ):
        if not same:
            raise UserError(
                f"cache: was made for another {name} than the model's; take a new_cache() of this "
                "model"
            )


@torch.compiler.disable(reason="looks at the mask on the host, once per forward call")
def _enter_model(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
    """Runs before the whole model and makes the cache's call last until the model has returned.

    Otherwise, running out of memory for the logits would leave the tokens in the cache, and the
    caller, who got an exception, would feed them again.
    """
    given = _given(module, args, kwargs)
    cache = find_cache(given)
    if cache is not None:
        cache.outer = _inputs(given)


@torch.compiler.disable(reason="looks at the mask on the host, once per forward call")
def _leave_model(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any) -> None:
    """Runs after the whole model and ends the cache's call."""
    cache = find_cache(_given(module, args, kwargs))
    if cache is not None:
        cache.end_forward()


@torch.compiler.disable(reason="looks at the mask on the host, once per forward call")
def _enter_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
    """Runs before the decoder and tells the cache which columns are tokens."""
    given = _given(module, args, kwargs)
    cache = find_cache(given)
    if cache is None:
        _choose_attention(module, given)
        return
    config: Any = module.config
    if getattr(config, "output_attentions", False):
        given.setdefault("output_attentions", True)
    refuse_unknown(given, _KNOWN)
    layers: Any = module.layers
    if any(x.training and getattr(x, "gradient_checkpointing", False) for x in layers):
        raise UserError(
            "gradient_checkpointing: takes the cache away from the layers in training mode; call "
            "model.eval(), turn gradient checkpointing off, or leave the cache out"
        )
    _check_model(cache, module)
    inputs = _inputs(given)
    if inputs is None:
        raise ValueError("input_ids: missing")
    batch, new_len = inputs.shape[:2]
    past = cache.get_seq_length()
    if not batch or not new_len:
        told = f"input_ids: a batch of {batch} with {new_len} columns is empty"
        if past:  # as `generate` makes of a turn that it takes for the whole sequence
            told += f"; give generate the {past} columns of the cache and then the new ones"
        raise ValueError(told)
    if not past or cache.position_limit is None:  # reading a configuration is slow
        cache.position_limit = position_limit(config)
        cache.window = layer_kinds(module).unreached
    limit = cache.position_limit
    if cache.window is not None and past + new_len > cache.window:
        raise UserError(
            f"model: {past + new_len} columns exceed its sliding window (sliding_window: "
            f"{cache.window}), which the quantized cache does not support; use shorter prompts or "
            "a cache of transformers"
        )
    if past <= limit < past + new_len:  # once per sequence
        warnings.warn(
            f"{past + new_len} columns, but the model is made for {limit} positions: what it gives "
            "beyond them is not to be relied on",
            stacklevel=2,
        )
    positions = given.get("position_ids")
    left_out = positions is None
    if positions is None:  # the decoder's default
        positions = torch.arange(past, past + new_len)[None]
    cache.within = cache.outer is inputs
    cache.outer = None
    mask = given.get("attention_mask")
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise UserError(
            f"attention_mask: must be a tensor [batch_size, columns], got {type(mask).__name__}"
        )
    cache.begin_forward(
        batch, new_len, mask, inputs.device, positions, given=not left_out, held=True
    )
    choose(module, cache, new_len)


def _choose_attention(decoder: Any, given: Arguments) -> None:
    """Chooses the attention of a call over a cache of transformers, or without a cache."""
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    inputs = _inputs(given)
    choose(decoder, cache, 0 if inputs is None else inputs.shape[1])


@torch.compiler.disable(reason="looks at the mask on the host, once per forward call")
def _leave_decoder(
    module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any
) -> None:
    """Runs after the decoder and ends the cache's call unless the whole model does so."""
    restore(module)
    cache = find_cache(_given(module, args, kwargs))
    if cache is not None and not cache.within:
        cache.end_forward()


def _hook(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Registers both hooks unless they are registered already."""
    if before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)


def install_attention(model: Any) -> None:
    """Replaces every attention module by a drop-in that handles quantized caches, too.

    Other caches work as before, and repeated calls change nothing. Names, weights and everything
    else that a checkpoint holds stay as they are.

    Raises:
        UserError: The architecture or an attention kind is not supported.
    """
    for attention in attention_layers(model):
        PrefillQuantizedAttention(attention)
    graph_calls(model)
    _hook(model, _enter_model, _leave_model)
    _hook(model.model, _enter_decoder, _leave_decoder)


def uninstall_attention(model: Any) -> None:
    """Restores the attention modules and removes the hooks of :func:`install_attention`."""
    for layer in model.model.layers:
        if isinstance(layer.self_attn, PrefillQuantizedAttention):
            layer.self_attn.restore()
    no_graph_calls(model)
    restore(model.model, every=True)
    ours = (_enter_model, _leave_model, _enter_decoder, _leave_decoder)
    for module in (model, model.model):
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]
                flags.pop(key, None)
