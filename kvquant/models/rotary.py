"""Reads a model's rotary embedding: angles, factors and tables, for each type of layer.

Most models rotate by one table. Some have one for each type of layer (Gemma 3: another base in
layers with a sliding window), and their rotary embedding takes the type as an argument.
"""

from __future__ import annotations

from typing import Any

import torch

from kvquant.formats.rope import Rope
from kvquant.models.adapters import AttentionAdapter, Table


def layer_type(attention: Any, rotary: Any) -> str | None:
    """Returns the type of a layer by which a rotary embedding chooses; None where it has one table.

    Args:
        attention: The attention module of the layer.
        rotary: The rotary embedding of the decoder.
    """
    return str(attention.layer_type) if hasattr(rotary, "layer_types") else None


def _of_type(rotary: Any, name: str, kind: str | None) -> Any:
    return getattr(rotary, name if kind is None else f"{kind}_{name}")


def rotary_width(model: Any, kind: str | None = None) -> int:
    """Returns the number of channels per head that a model's RoPE rotates.

    Args:
        model: The causal language model.
        kind: See :func:`layer_type`.
    """
    return 2 * int(_of_type(model.model.rotary_emb, "inv_freq", kind).numel())


def one_factor(model: Any, head_dim: int, kind: str | None = None) -> bool:
    """Returns whether a model's cosine and sine have one factor for all channels of a head.

    Channels that RoPE leaves as they are do not get the factor of some rope scalings.

    Args:
        model: The causal language model.
        head_dim: Number of channels per head.
        kind: See :func:`layer_type`.
    """
    factor = _of_type(model.model.rotary_emb, "attention_scaling", kind)
    return factor == 1 or rotary_width(model, kind) == head_dim


def static_rope(model: Any, kind: str | None = None) -> bool:
    """Returns whether a position's rotation is the same in calls of any length.

    Args:
        model: The causal language model.
        kind: See :func:`layer_type`.
    """
    found: Any = getattr(model.model.rotary_emb, "rope_type", "default")
    name = str(found if kind is None else found[kind])
    return "dynamic" not in name and name != "longrope"


def model_rope(
    model: Any, adapter: AttentionAdapter, head_dim: int, kind: str | None = None
) -> Rope:
    """Returns a model's rotary tables as caches know them, in fp32, where the positions are.

    Args:
        model: The causal language model.
        adapter: The adapter of its family.
        head_dim: Number of channels per head.
        kind: See :func:`layer_type`.
    """
    types = () if kind is None else (kind,)

    def rope(positions: torch.Tensor) -> Table:
        device = positions.device
        like = torch.empty(0, dtype=torch.float32, device=device)
        cos, sin = adapter.table(model.model.rotary_emb(like, positions, *types), head_dim)
        # Of a model on several GPUs, the embedding computes on its own one.
        return cos.to(device, non_blocking=True), sin.to(device, non_blocking=True)

    return rope


def same_angles(a: Any, b: Any) -> bool:
    """Returns whether two rotary embeddings rotate by the same angles in every type of layer."""
    kinds = getattr(a, "layer_types", None)
    if kinds != getattr(b, "layer_types", None) or a.rope_type != b.rope_type:
        return False
    for kind in [None] if kinds is None else a.rope_type:
        if _of_type(a, "attention_scaling", kind) != _of_type(b, "attention_scaling", kind):
            return False
        x, y = (_frequencies(rotary, kind).cpu() for rotary in (a, b))
        if not torch.equal(x, y):
            return False
    return True


def _frequencies(rotary: Any, kind: str | None) -> torch.Tensor:
    """Returns the frequencies before any scaling that changes with the length."""
    name = "original_inv_freq" if kind is None else f"{kind}_original_inv_freq"
    found: torch.Tensor | None = getattr(rotary, name, None)
    return _of_type(rotary, "inv_freq", kind) if found is None else found
