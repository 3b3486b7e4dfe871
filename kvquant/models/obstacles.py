"""Finds what keeps a model from using quantized caches, for one error that names it and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from kvquant.study.model_families import ModelFamily, supported_families

# Parts of a layer that take the place of attention over keys and values, in transformers' names.
_LINEAR = ("linear_attn", "mamba", "mixer", "temporal_block", "conv", "ssm", "recurrent")
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "kv_a_proj")
_OTHERWISE = "use a cache of transformers, or a model of one of the families"


def unsupported_attention(attention: str) -> str:
    """Returns the error for an attention class of no registered family."""
    return (
        f"model: attention '{attention}' is not supported; supported families: "
        f"{supported_families()}"
    )


def unsupported_configuration(config: Any) -> str | None:
    """Returns the error for the configuration of an encoder-decoder model, or None."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    return (
        f"model: '{config.model_type}' is an encoder-decoder model (is_encoder_decoder: true), "
        "whose cross-attention the quantized cache does not hold; "
        f"{_OTHERWISE} {supported_families()}"
    )


def unsupported_model(model: Any) -> str | None:
    """Returns the error for a model without a decoder's layers of its own, or None."""
    config = getattr(model, "config", None)
    if (problem := unsupported_configuration(config)) is not None:
        return problem
    if hasattr(model, "get_base_model"):
        return (
            f"model: '{type(model).__name__}' wraps a model with adapters (PEFT); give its "
            "get_base_model(), whose layers hold them, and then call either of the two"
        )
    if getattr(getattr(model, "model", None), "layers", None) is None:
        return (
            f"model: '{type(model).__name__}' is not supported; it must be a causal language model "
            f"of one of the families {supported_families()}"
        )
    return None


def layer_obstacle(layer: nn.Module, number: int) -> str | None:
    """Returns the error for a layer without an attention over keys and values, or None.

    Args:
        layer: The layer of the decoder.
        number: Its index.
    """
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        names = [name for name, _ in layer.named_children()]
        found = next((name for name in names if name in _LINEAR), None)
        what = f"is '{found}'" if found else f"has no 'self_attn' (it has {', '.join(names)})"
        return (
            f"model: layer {number} {what}: linear attention and state-space layers have no keys "
            f"and values to quantize; {_OTHERWISE} {supported_families()}"
        )
    found = next((name for name in _LATENT if hasattr(attention, name)), None)
    if found is not None:
        rank = getattr(getattr(attention, "config", None), "kv_lora_rank", None)
        return (
            f"model: layer {number} uses multi-head latent attention ('{found}', kv_lora_rank: "
            f"{rank}), whose latents the quantized cache does not hold; {_OTHERWISE} "
            f"{supported_families()}"
        )
    return None


def attention_window(attention: Any, config: Any, family: ModelFamily | None) -> int | None:
    """Returns the number of tokens that an attention sees, or None if it sees all.

    Args:
        attention: The attention module of a layer.
        config: The configuration of the model.
        family: Its family; None for an unsupported one.
    """
    whole = family is not None and family.window_in_config
    for place in (attention, config) if whole else (attention,):
        if getattr(place, "sliding_window", None) is not None:
            return int(place.sliding_window)
    if hasattr(attention, "sliding_window") and _masked_by_window(attention, config):
        return int(config.sliding_window)
    return None


def _masked_by_window(attention: Any, config: Any) -> bool:
    """Returns whether the decoder's mask is that of a window, even if the attention knows of none.

    SmolLM3 chooses the mask by `layer_types` alone, whatever its `use_sliding_window` says.
    """
    types = getattr(config, "layer_types", None)
    sliding = types is not None and types[attention.layer_idx] == "sliding_attention"
    return sliding and getattr(config, "sliding_window", None) is not None


def attention_obstacles(
    attention: Any, config: Any, family: ModelFamily | None
) -> Iterator[tuple[str, str]]:
    """Yields what an attention does that quantized caches do not: what it uses, and the field.

    Args:
        attention: The attention module of a layer.
        config: The configuration of the model.
        family: Its family; None for an unsupported one.
    """
    cap = getattr(attention, "attn_logit_softcapping", None)
    if cap is not None and (family is None or not family.soft_capping):
        yield "soft-capping of scores", f"attn_logit_softcapping: {cap}"
    if getattr(config, "use_bidirectional_attention", False):
        yield "attention to later tokens", "use_bidirectional_attention: true"
    if isinstance(getattr(attention, "sinks", None), nn.Parameter) and (
        family is None or family.sink_logits is None
    ):
        yield "attention sinks", "the learned parameter 'sinks'"


def wrong_implementation(attention: Any, config: Any, family: ModelFamily) -> str | None:
    """Returns the error for an implementation that leaves out caps or sinks, or None.

    Args:
        attention: The attention module of a layer.
        config: The configuration of the model.
        family: Its family.
    """
    if config._attn_implementation != "sdpa":
        return None
    cap = getattr(attention, "attn_logit_softcapping", None) if family.soft_capping else None
    if cap is not None:
        told = f"it caps its scores (attn_logit_softcapping: {cap})"
    elif family.sink_logits is not None:
        told = f"it has attention sinks (the learned parameter '{family.sink_logits}')"
    else:
        return None
    return (
        f"model: {told}, which attn_implementation 'sdpa' leaves out; load it with "
        "attn_implementation='eager'"
    )


def refused_features(number: int, found: list[tuple[str, str]]) -> str:
    """Returns the error for what :func:`attention_obstacles` found in a layer.

    Args:
        number: Index of the layer.
        found: What it uses, and the field of each.
    """
    told = " and ".join(f"{what} ({field})" for what, field in found)
    return (
        f"model: layer {number} uses {told}, which the quantized cache does not support; use a "
        "cache of transformers, or a model without"
    )
