"""Tells a model's layers apart: those that see all tokens, and those with a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvquant.errors import UserError
from kvquant.models.obstacles import attention_window
from kvquant.models.prefill_quant import original_class
from kvquant.models.rotary import layer_type
from kvquant.study.model_families import family_of_attention


def position_limit(config: Any) -> int:
    """Returns the longest supported sequence, with the scaling of RoPE included.

    Some configurations state the scaled length as `max_position_embeddings`, others the length that
    the factor multiplies. The larger of the two readings counts. Where each type of layer has
    parameters of its own, those of the layers that see all tokens count.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    positions = int(config.max_position_embeddings)
    base = int(rope.get("original_max_position_embeddings") or positions)
    return max(positions, int(base * float(rope.get("factor") or 1.0)))


@dataclass(frozen=True)
class LayerKinds:
    """What kind each layer of a decoder is.

    Attributes:
        windows: The sliding window of each layer; None where the layer sees all tokens, or all of a
            sequence as long as the model is made for, by the rotary table of those that see all.
        unreached: The shortest window that no sequence as long as the model is made for exceeds;
            None if there is no such window.
        soft_cap: Bound of the scores, by which the hyperbolic tangent squeezes them; None: there is
            none.
        sinks: Whether there are layers with learned attention sinks.
        full_rope: Type of the layers that see all tokens, for the rotary embedding; None where it
            has one table.
        window_rope: Type of the layers with a window, likewise.
    """

    windows: tuple[int | None, ...]
    unreached: int | None
    soft_cap: float | None
    sinks: bool
    full_rope: str | None
    window_rope: str | None

    @property
    def full(self) -> list[int]:
        """The indices of the layers that see all tokens, whose keys and values are quantized."""
        return [i for i, window in enumerate(self.windows) if window is None]

    @property
    def window(self) -> int | None:
        """The sliding window of the layers that have one; None if there is no such layer."""
        return next((window for window in self.windows if window is not None), None)


def layer_kinds(decoder: Any) -> LayerKinds:
    """Returns the kinds of a decoder's layers.

    Args:
        decoder: The decoder, with `layers`, `rotary_emb` and `config`.

    Raises:
        UserError: Windows or caps of scores differ from layer to layer, or a window is empty.
    """
    config, limit = decoder.config, position_limit(decoder.config)
    attentions = [layer.self_attn for layer in decoder.layers]
    families = [family_of_attention(original_class(a).__name__) for a in attentions]
    every = [
        attention_window(attention, config, family)
        for attention, family in zip(attentions, families, strict=True)
    ]
    types = [layer_type(attention, decoder.rotary_emb) for attention in attentions]
    reached = [None if window is None or window >= limit else window for window in every]
    if len({kind for kind, window in zip(types, reached, strict=True) if window is None}) > 1:
        # Layers that see all tokens share a rotary table, which those of another type do not have.
        reached = every
    found = {window for window in reached if window is not None}
    if min(found, default=2) < 2:
        raise UserError(
            f"model: sliding_window: {min(found)} tokens leave no earlier one to attend to"
        )
    if len(found) > 1:
        raise UserError(
            f"model: sliding_window: layers have windows of {' and '.join(map(str, sorted(found)))}"
            " tokens, and the quantized cache supports one length; use a cache of transformers"
        )
    caps = {
        getattr(attention, "attn_logit_softcapping", None)
        for attention, family in zip(attentions, families, strict=True)
        if family is not None and family.soft_capping
    } or {None}
    if len(caps) > 1:
        raise UserError(
            "model: attn_logit_softcapping: differs from layer to layer, and the quantized cache "
            "supports one cap; use a cache of transformers"
        )
    ropes = {window is None: kind for window, kind in zip(reached, types, strict=True)}
    unreached = [w for w, r in zip(every, reached, strict=True) if w is not None and r is None]
    return LayerKinds(
        tuple(reached),
        min(unreached, default=None),
        caps.pop(),
        any(family is not None and family.sink_logits is not None for family in families),
        ropes.get(True, ropes.get(False)),
        ropes.get(False),
    )
