"""Models that quantized caches do not serve: one line names the layer, the field and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kvquant.errors import UserError
from kvquant.models.hooks import attention_layers
from kvquant.models.layer_kinds import layer_kinds
from kvquant.models.loading import install_attention, load_quantized_model
from kvquant.models.static_decoding import StaticDecoder
from kvquant.schemes.fp16_static import StaticFp16Cache
from kvquant.study.model_families import MODEL_FAMILIES, family_of_attention
from tests.support.caches import CLOSE, EXACT, ids, quantized, step
from tests.support.models import tiny_model

LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# The family, its options, and how the error begins.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma 3 with a cap, which its own attention does not read": (
        "gemma3_text",
        {"attn_logit_softcapping": 30.0},
        "layer 0 uses soft-capping of scores (attn_logit_softcapping: 30.0), which the quantized",
    ),
    "an embedding model": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "layer 0 uses attention to later tokens (use_bidirectional_attention: true), which the",
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        LATENT,
        "layer 0 uses multi-head latent attention ('kv_a_proj_with_mqa', kv_lora_rank: 16), whose",
    ),
    "Qwen3-Next": ("qwen3_next", LINEAR, "layer 0 is 'linear_attn': linear attention and"),
    "another family": ("starcoder2", {}, "attention 'Starcoder2Attention' is not supported"),
}


@pytest.mark.refused(
    "{name}",
    "`model`, the layer and the field; a cache of transformers, or a model of a family above",
)
@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_layer_and_field(name: str) -> None:
    family, options, message = REFUSED[name]
    model = tiny_model(family, attention="eager", **options)
    for call in (attention_layers, install_attention):
        with pytest.raises(UserError) as found:
            call(model)
        assert str(found.value).startswith(f"model: {message}")
        assert "\n" not in str(found.value)


def test_a_window_that_no_sequence_of_the_model_exceeds() -> None:
    """It hides nothing until a sequence is longer than the model is made for, and then it would."""
    options: dict[str, Any] = {"max_position_embeddings": 64, "sliding_window": 66}
    model = tiny_model("phi3", **options)
    shorter = tiny_model("phi3", **{**options, "sliding_window": 63})
    assert layer_kinds(shorter.model).windows == (63, 63)
    assert layer_kinds(model.model).windows == (None, None)
    qm = quantized(model, EXACT)
    cache, tokens = qm.new_cache(), ids(1, 70)
    with torch.inference_mode():
        expected = model(tokens).logits
    step(model, cache, tokens[:, :60])
    with pytest.warns(UserWarning, match="66 columns, but the model is made for 64 positions"):
        found = step(model, cache, tokens[:, 60:66])
    torch.testing.assert_close(found, expected[:, 60:66], **CLOSE)
    for call in (model, model.model):
        with pytest.raises(UserError, match=r"model: 67 columns exceed its sliding window \(slid"):
            step(call, cache, tokens[:, 66:67])
    assert cache.get_seq_length() == 66
    with pytest.raises(UserError, match="model: 70 columns exceed its sliding window"):
        step(model, qm.new_cache("B"), tokens)


def test_windows_of_several_lengths() -> None:
    model = tiny_model("gemma3_text", sliding_window=64, layer_types=["sliding_attention"] * 2)
    model.model.layers[1].self_attn.sliding_window = 32
    with pytest.raises(UserError, match="sliding_window: layers have windows of 32 and 64 tokens"):
        attention_layers(model)


@pytest.mark.refused(
    "attention sinks in another family than GPT-OSS",
    "`model`, the layer and the parameter `sinks`; a cache of transformers, or a model without",
)
def test_sinks_of_a_family_that_has_none() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UserError, match=r"layer 1 uses attention sinks \(the learned parameter 's"):
        attention_layers(model)


IGNORED: dict[str, tuple[str, str]] = {
    "Gemma 2": ("gemma2", r"it caps its scores \(attn_logit_softcapping: 50.0\), which at"),
    "GPT-OSS": ("gpt_oss", r"it has attention sinks \(the learned parameter 'sinks'\), which at"),
}


@pytest.mark.refused(
    '{name} with `attn_implementation="sdpa"`, which leaves out caps of scores and sinks',
    '`attn_logit_softcapping` or the parameter `sinks`; `attn_implementation="eager"`',
)
@pytest.mark.parametrize("name", IGNORED)
def test_caps_and_sinks_that_an_implementation_would_leave_out(name: str) -> None:
    family, message = IGNORED[name]
    model = tiny_model(family, sliding_window=64)
    assert len(attention_layers(model)) == 2
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UserError, match=f"model: {message}"):
        attention_layers(model)


def test_caps_that_differ_from_layer_to_layer() -> None:
    model = tiny_model("gemma2")
    model.model.layers[1].self_attn.attn_logit_softcapping = 30.0
    with pytest.raises(UserError, match="attn_logit_softcapping: differs from layer to layer"):
        attention_layers(model)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", r"model: caps its scores \(attn_logit_softcapping: 50"),
        ("gpt_oss", r"model: has attention sinks \(the learned parameter 'sinks'\), which these"),
    ],
)
def test_decoding_from_a_static_cache_knows_no_caps_and_no_sinks(family: str, message: str) -> None:
    model, cache = tiny_model(family), StaticFp16Cache(2, 16)
    step(model, cache, ids(1, 9))
    with pytest.raises(ValueError, match=message):
        StaticDecoder(model, cache, torch.ones_like(ids(1, 9)), 6)


def test_decoding_from_a_static_cache_ends_at_the_window() -> None:
    model = tiny_model("phi3", max_position_embeddings=64, sliding_window=66)
    cache, tokens = StaticFp16Cache(2, 16), ids(1, 60)
    step(model, cache, tokens)
    StaticDecoder(model, cache, torch.ones_like(tokens), 6)
    with pytest.raises(ValueError, match=r"67 columns exceed the model's sliding window \(slid"):
        StaticDecoder(model, cache, torch.ones_like(tokens), 7)


class Wrapped(torch.nn.Module):
    """A model with adapters, as PEFT gives it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def get_base_model(self) -> Any:
        return self.inner


@pytest.mark.refused(
    "`load_quantized_model` of PEFT's wrapper",
    "`model`; give its `get_base_model()`, and then generate with either of the two",
)
def test_a_model_around_a_model() -> None:
    """Its adapters are in the projections of the inner model, whose attention is replaced."""
    wrapped = Wrapped(tiny_model())
    with pytest.raises(UserError, match=r"model: 'Wrapped' wraps .*; give its get_base_model\(\)"):
        load_quantized_model(wrapped)
    assert load_quantized_model(wrapped.get_base_model()).model is wrapped.inner


@pytest.mark.refused(
    "encoder-decoder models (T5)",
    "`is_encoder_decoder`; a cache of transformers, or a model of a family above",
)
def test_an_encoder_decoder_model() -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
    )
    with pytest.raises(UserError, match=r"'t5' is an encoder-decoder model \(is_enc"):
        attention_layers(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mamba", "'MambaForCausalLM' is not supported; it must be a causal language model"),
        ("t5", "'t5' is an encoder-decoder model (is_encoder_decoder: true), whose"),
    ],
)
def test_a_folder_is_refused_before_its_weights_are_read(
    model_type: str, message: str, tmp_path: Path
) -> None:
    """Transformers' own errors speak of an attention implementation or of a model class."""
    config = AutoConfig.for_model(
        model_type, num_hidden_layers=2, hidden_size=64, num_local_experts=4, vocab_size=97
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as found:
        load_quantized_model(tmp_path)
    assert str(found.value).startswith(f"model: {message}")


@pytest.mark.refused("state-space models (Mamba)", "`model`; a model of a family above")
def test_a_state_space_model() -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4
    )
    with pytest.raises(UserError, match="model: 'MambaForCausalLM' is not supported; it must be a"):
        attention_layers(AutoModelForCausalLM.from_config(config))


def test_a_layer_without_attention() -> None:
    model = tiny_model()
    del model.model.layers[1].self_attn
    with pytest.raises(UserError, match=r"model: layer 1 has no 'self_attn' \(it has mlp, input_"):
        attention_layers(model)
    model.model.layers[1].mamba = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="model: layer 1 is 'mamba': linear attention and state"):
        attention_layers(model)


def test_other_families_are_refused_with_the_list_of_those_that_work() -> None:
    with pytest.raises(UserError, match="'Starcoder2Attention' is not supported") as found:
        attention_layers(tiny_model("starcoder2"))
    assert all(family.label in str(found.value) for family in MODEL_FAMILIES.values())
    assert family_of_attention("Starcoder2Attention") is None
