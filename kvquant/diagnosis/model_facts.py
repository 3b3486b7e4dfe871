"""Reads from a model's configuration what its cache depends on, without its weights.

The model is made on torch's meta device, which allocates nothing, so that its layers are judged by
the code that judges a loaded model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kvquant.errors import UserError
from kvquant.models.base_model import default_attention, load_config
from kvquant.models.hooks import layer_problem, unrotated_layers
from kvquant.models.layer_kinds import LayerKinds, layer_kinds, position_limit
from kvquant.models.obstacles import unsupported_configuration, unsupported_model
from kvquant.models.prefill_quant import original_class
from kvquant.models.rotary import one_factor, static_rope
from kvquant.models.tensor_parallel import norm_by_head, plan_gathers
from kvquant.study.model_families import MODEL_FAMILIES, family_of_attention

MAX_LAYERS = 4096  # as in quantizers; making more, even without memory, takes minutes


@dataclass(frozen=True)
class LayerGroup:
    """Layers that a quantized cache treats alike.

    Attributes:
        kind: Whether they see all tokens, have a sliding window, or are refused.
        layers: Their indices.
        window: The sliding window in tokens; None where all tokens are seen.
        problem: Why the first of them is refused; empty for others.
    """

    kind: Literal["full", "sliding", "refused"]
    layers: tuple[int, ...]
    window: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class CacheFacts:
    """The facts of a supported model on which its cache depends.

    Attributes:
        windows: The sliding window of each layer; None where it sees all tokens.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Channels per head.
        soft_cap: Bound of the scores; None: there is none.
        static_rope: Whether one rotary table serves all layers, channels and lengths.
        kept_rope: Whether the rotation changes with the length.
        positions: The longest supported sequence.
        hidden: Channels of the residual stream.
        widest: Channels of the widest activation of a layer, per token.
        eager: Whether attention holds all scores of a call.
    """

    windows: tuple[int | None, ...]
    heads: int
    kv_heads: int
    head_dim: int
    soft_cap: float | None
    static_rope: bool
    kept_rope: bool
    positions: int
    hidden: int
    widest: int
    eager: bool

    @property
    def full_layers(self) -> int:
        """Number of layers that see all tokens."""
        return sum(window is None for window in self.windows)

    @property
    def own_windows(self) -> list[int]:
        """The sliding windows of the other layers."""
        return [window for window in self.windows if window is not None]


@dataclass(frozen=True)
class ModelFacts:
    """What a configuration says about a model.

    Attributes:
        name: The folder or hub id that was given.
        model_type: The architecture's name in transformers.
        family: The supported family; None for a model of another one.
        groups: The layers by what a cache does with them; empty if the model cannot be made.
        refused: Why quantized caches do not serve the model; None if they do.
        cache: What its cache depends on; None for a refused model.
        parameters: Number of weights, shared ones once.
        layer_parameters: Number of weights of each layer.
        embedding_parameters: Number of weights of the input embeddings.
        gathers: Whether processes that share the model compute keys and values of all heads; None:
            they cannot share its heads by transformers' plan, if it has one.
        stored: Method by which the checkpoint's weights are quantized; None: they are not.
        dtype: The checkpoint's dtype by its configuration, if it says so.
    """

    name: str
    model_type: str
    family: str | None = None
    groups: tuple[LayerGroup, ...] = ()
    refused: str | None = None
    cache: CacheFacts | None = None
    parameters: int = 0
    layer_parameters: tuple[int, ...] = ()
    embedding_parameters: int = 0
    gathers: bool | None = None
    stored: str | None = None
    dtype: torch.dtype | None = None


def read_model(model: str | Path) -> ModelFacts:
    """Reads a model's configuration and judges its layers.

    Args:
        model: Folder or hub id.

    Raises:
        UserError: The configuration cannot be read.
    """
    config = load_config(model)
    kind, name = str(config.model_type), str(model)
    if (problem := unsupported_configuration(config)) is not None:
        return ModelFacts(name, kind, refused=problem)
    layers = int(getattr(config, "num_hidden_layers", None) or 0)
    if not 1 <= layers <= MAX_LAYERS and hasattr(config, "num_hidden_layers"):
        told = f"num_hidden_layers: {layers:,} is not between 1 and {MAX_LAYERS:,}"
        return ModelFacts(name, kind, refused=f"model: {told}")
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(
                config, attn_implementation=default_attention(config)
            )
    except Exception as error:  # each architecture checks its configuration in its own way
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return ModelFacts(name, kind, refused=f"model: '{kind}' cannot be made: {told}")
    return judge_model(made, name)


def judge_model(model: Any, name: str) -> ModelFacts:
    """Judges the layers of a model, which may be on the meta device.

    Args:
        model: The causal language model.
        name: What it is called.
    """
    config = model.config
    made: dict[str, Any] = {
        "name": name,
        "model_type": str(config.model_type),
        "parameters": _parameters(model),
        "stored": _stored(config),
        "dtype": _dtype(config),
    }
    if (problem := unsupported_model(model)) is not None:
        return ModelFacts(**made, refused=problem)
    problems = [layer_problem(model, layer, n) for n, layer in enumerate(model.model.layers)]
    attentions = [getattr(layer, "self_attn", None) for layer in model.model.layers]
    families = [
        family_of_attention(original_class(attention).__name__)
        for attention in attentions
        if attention is not None
    ]
    family = next((f.label for f in families if f is not None), None)
    refused = next((p for p in problems if p is not None), None)
    if refused is not None:
        groups = _groups([None] * len(problems), problems)
        return ModelFacts(**made, family=family, groups=groups, refused=refused)
    if (positions := position_limit(config)) < 1:
        told = f"model: max_position_embeddings: {positions:,} leaves no room for a token"
        return ModelFacts(**made, family=family, refused=told)
    try:
        kinds = layer_kinds(model.model)
    except UserError as error:  # layers are supported, but not beside one another
        return ModelFacts(**made, family=family, refused=str(error))
    groups = _groups(kinds.windows, problems)
    facts = _cache_facts(model, kinds, attentions)
    made["layer_parameters"] = tuple(map(_parameters, model.model.layers))
    made["embedding_parameters"] = _parameters(model.get_input_embeddings())
    with suppress(UserError):
        gathers = plan_gathers(config)
        of_heads = any(norm_by_head(a, MODEL_FAMILIES[config.model_type]) for a in attentions)
        made["gathers"] = gathers if gathers or not of_heads else None
    return ModelFacts(**made, family=family, groups=groups, cache=facts)


def _parameters(module: Any) -> int:
    """Returns the number of weights of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def _cache_facts(model: Any, kinds: LayerKinds, attentions: list[Any]) -> CacheFacts:
    config = model.config
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    static = static_rope(model, kinds.full_rope)
    one = not unrotated_layers(attentions) & set(kinds.full)
    one = one and one_factor(model, dim, kinds.full_rope)
    inner = [getattr(config, n, None) or 0 for n in ("intermediate_size", "moe_intermediate_size")]
    return CacheFacts(
        windows=kinds.windows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        soft_cap=kinds.soft_cap,
        static_rope=static and one,
        kept_rope=not static,
        positions=position_limit(config),
        hidden=int(config.hidden_size),
        widest=max(map(int, inner)) * int(getattr(config, "num_experts_per_tok", None) or 1),
        eager=default_attention(config) == "eager",
    )


def _groups(
    windows: Sequence[int | None], problems: Sequence[str | None]
) -> tuple[LayerGroup, ...]:
    """Returns the layers by kind, those that see all tokens first."""
    refused = tuple(i for i, problem in enumerate(problems) if problem is not None)
    found = []
    for window in sorted(set(windows), key=lambda w: w or 0):
        layers = [i for i, own in enumerate(windows) if own == window and i not in refused]
        if layers:
            kind: Literal["full", "sliding"] = "full" if window is None else "sliding"
            found.append(LayerGroup(kind, tuple(layers), window))
    alike: dict[str, list[int]] = {}  # by what is wrong, whatever the layer's number
    for i in refused:
        alike.setdefault(re.sub(r"layer \d+ ", "", problems[i] or ""), []).append(i)
    found += [
        LayerGroup("refused", tuple(layers), problem=problems[layers[0]] or "")
        for layers in alike.values()
    ]
    return tuple(found)


def _stored(config: Any) -> str | None:
    """Returns how a checkpoint's weights are quantized, if they stay so when they are loaded."""
    stored = getattr(config, "quantization_config", None) or {}
    if not stored:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    return None if method == "mxfp4" else str(method or "unknown")  # MXFP4 is dequantized


def _dtype(config: Any) -> torch.dtype | None:
    found = getattr(config, "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else None
