"""The families of language models whose attention works with quantized caches.

A family is registered here and nowhere else: :mod:`kvquant.models.adapters` reads how its attention
is built, the error for other models lists it, and the tests of families run over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvquant.study.registrations import by_name


@dataclass(frozen=True)
class ModelFamily:
    """Models of one architecture in transformers.

    The decoder must be at `model.model` with `layers` and `rotary_emb`, the attention of a layer at
    `self_attn` with `o_proj`, `head_dim` and `scaling`, and its projections must be called
    `q_proj`, `k_proj` and `v_proj` unless they are fused. A rotary table narrower than a head
    rotates the first channels of each head, and leaves the others as they are.

    Attributes:
        name: The `model_type` of the configuration.
        label: The name in tables and errors.
        attention: Name of the attention class in transformers.
        window_in_config: Whether a `sliding_window` in the configuration holds for all layers; in
            other families the attention of each layer says whether it has one.
        fused: Name of the one projection that gives queries, keys and values in this order; None
            for three projections.
        norms: Names of the norms of queries and keys before RoPE, where the attention has them.
        norm_input: What these norms get: a head's channels of `[batch_size, seq_len, num_heads,
            head_dim]` ("heads"), the same with the heads before the tokens ("heads-first"), or the
            channels of all heads together ("projection").
        interleaved: Whether RoPE rotates channels 2i and 2i + 1, instead of i and i + half.
        scaled_queries: Whether queries are multiplied by a factor that grows with their position,
            `llama_4_scaling_beta` of the rotary parameters (Llama 4, Ministral 3).
        rope_switch: Attribute of an attention that says whether it has RoPE; None where all have.
        logit_divisor: Field of the configuration by which logits are divided; None: by nothing.
        logit_factor: Field of the configuration by which logits are multiplied; None: by nothing.
        logit_cap: Field of the configuration with the bound of logits, by which the hyperbolic
            tangent squeezes them; None: there is no such field.
        soft_capping: Whether scores are squeezed in this way before the mask, by the
            `attn_logit_softcapping` of an attention.
        half_table: Whether a rotary table has the angle of each pair of channels once; in other
            families it has it twice.
        sink_logits: Attribute of an attention with one learned logit per query head, which takes
            its share of the softmax and has no value (attention sinks); None: there is none.
    """

    name: str
    label: str
    attention: str
    window_in_config: bool = False
    fused: str | None = None
    norms: tuple[str, str] = ("q_norm", "k_norm")
    norm_input: Literal["heads", "heads-first", "projection"] = "heads"
    interleaved: bool = False
    scaled_queries: bool = False
    rope_switch: str | None = None
    logit_divisor: str | None = None
    logit_factor: str | None = None
    logit_cap: str | None = None
    soft_capping: bool = False
    half_table: bool = False
    sink_logits: str | None = None


MODEL_FAMILIES = by_name(
    (
        ModelFamily("llama", label="Llama", attention="LlamaAttention"),
        ModelFamily(
            "mistral", label="Mistral", attention="MistralAttention", window_in_config=True
        ),
        ModelFamily("qwen2", label="Qwen2", attention="Qwen2Attention"),
        ModelFamily("qwen3", label="Qwen3", attention="Qwen3Attention"),
        ModelFamily(
            "mixtral", label="Mixtral", attention="MixtralAttention", window_in_config=True
        ),
        ModelFamily("qwen2_moe", label="Qwen2-MoE", attention="Qwen2MoeAttention"),
        ModelFamily("qwen3_moe", label="Qwen3-MoE", attention="Qwen3MoeAttention"),
        ModelFamily(
            "granite",
            label="Granite",
            attention="GraniteAttention",
            logit_divisor="logits_scaling",
        ),
        ModelFamily("gemma", label="Gemma", attention="GemmaAttention"),
        ModelFamily(
            "gemma2",
            label="Gemma 2",
            attention="Gemma2Attention",
            logit_cap="final_logit_softcapping",
            soft_capping=True,
        ),
        ModelFamily(
            "gemma3_text",
            label="Gemma 3 (text)",
            attention="Gemma3Attention",
            norm_input="heads-first",
            logit_cap="final_logit_softcapping",
        ),
        ModelFamily("olmo2", label="OLMo 2", attention="Olmo2Attention", norm_input="projection"),
        ModelFamily(
            "phi3",
            label="Phi-3 and Phi-4",
            attention="Phi3Attention",
            window_in_config=True,
            fused="qkv_proj",
        ),
        ModelFamily(
            "stablelm",
            label="StableLM",
            attention="StableLmAttention",
            norms=("q_layernorm", "k_layernorm"),
            norm_input="heads-first",
        ),
        ModelFamily(
            "cohere",
            label="Cohere",
            attention="CohereAttention",
            interleaved=True,
            logit_factor="logit_scale",
        ),
        ModelFamily("ministral", label="Ministral", attention="MinistralAttention"),
        ModelFamily(
            "ministral3",
            label="Ministral 3",
            attention="Ministral3Attention",
            window_in_config=True,
            scaled_queries=True,
        ),
        ModelFamily(
            "smollm3", label="SmolLM3", attention="SmolLM3Attention", rope_switch="use_rope"
        ),
        ModelFamily(
            "gpt_oss",
            label="GPT-OSS",
            attention="GptOssAttention",
            half_table=True,
            sink_logits="sinks",
        ),
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
