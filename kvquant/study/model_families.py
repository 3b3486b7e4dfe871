"""The families of language models whose attention works with quantized caches.

A family is registered here and nowhere else: :mod:`kvquant.models` accepts its attention, the error
for other models lists it, and the tests of families run over it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvquant.study.registrations import by_name


@dataclass(frozen=True)
class ModelFamily:
    """Models of one architecture in transformers.

    The decoder must be at `model.model` with `layers` and `rotary_emb`, the attention of a layer at
    `self_attn` with `q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim` and `scaling`. Norms of
    queries and keys before RoPE are called `q_norm` and `k_norm`.

    Attributes:
        name: The `model_type` of the configuration.
        label: The name in tables and errors.
        attention: Name of the attention class in transformers.
        window_in_config: Whether a `sliding_window` in the configuration holds for all layers; in
            other families the attention of each layer says whether it has one.
    """

    name: str
    label: str
    attention: str
    window_in_config: bool = False


MODEL_FAMILIES = by_name(
    (
        ModelFamily("llama", label="Llama", attention="LlamaAttention"),
        ModelFamily(
            "mistral", label="Mistral", attention="MistralAttention", window_in_config=True
        ),
        ModelFamily("qwen2", label="Qwen2", attention="Qwen2Attention"),
        ModelFamily("qwen3", label="Qwen3", attention="Qwen3Attention"),
        # A new family goes above this line.
    )
)


def family_of_attention(attention: str) -> ModelFamily | None:
    """Returns the family that an attention class belongs to; None for an unsupported one."""
    found = (family for family in MODEL_FAMILIES.values() if family.attention == attention)
    return next(found, None)


def supported_families() -> str:
    """Returns the supported families in one line, for errors."""
    found = (f"{family.label} ({family.attention})" for family in MODEL_FAMILIES.values())
    return ", ".join(found)
