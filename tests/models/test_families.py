"""The matrix of model families: what a cache gives for each of them, beside the unquantized one.

A family joins by its registration alone. Also covers: models.adapters.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvquant.cache.attending import AttendingCache
from kvquant.calibration.build import build_layer, percentile
from kvquant.calibration.collect import calibrate
from kvquant.errors import UserError
from kvquant.evaluation.likelihood import score
from kvquant.evaluation.perplexity import measure_windows
from kvquant.formats.rope import rotate
from kvquant.kernels.backends import select
from kvquant.models.hooks import attention_layers
from kvquant.models.loading import QuantizedModel, load_quantized_model
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.model_families import MODEL_FAMILIES, ModelFamily, family_of_attention
from kvquant.study.schemes import Fp8Scheme, Fp16Scheme, KvquantRefScheme, NuqScheme
from tests.support.cache_uses import LENGTH, USES, fed, sharpen
from tests.support.caches import CLOSE, EXACT, feed, ids, quantized, step, stored
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.quantizers import relative_error

PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
# Options of a family that change its attention or its logits, by the family's name and a word.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-biases": {"attention_bias": True},
    "granite-factors": {
        "attention_multiplier": 0.1, "logits_scaling": 3.0, "embedding_multiplier": 2.0,
    },
    "stablelm-norms": {"qk_layernorm": True, "use_qkv_bias": True},
    # channels that RoPE leaves as they are do not get the factor of the others
    "stablelm-yarn": {"rope_parameters": {**YARN, "original_max_position_embeddings": 128,
                                          "partial_rotary_factor": 0.25}},
    # as in Phi-3-mini-128k: a window that no sequence reaches
    "phi3-window": {"sliding_window": 512},
    "phi3-partial": {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.75}},
    "phi3-longrope": {
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6,
            "original_max_position_embeddings": 512,
        },
    },
    "smollm3-first": {"no_rope_layers": [0, 1]},  # as they are saved: 0 is a layer without RoPE
    "smollm3-last": {"no_rope_layers": [1, 0]},
    "cohere-norms": {"use_qk_norm": True},
    "ministral3-long": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": 16,
                            "llama_4_scaling_beta": 0.3},
    },
}  # fmt: skip
families = pytest.mark.parametrize("family", [*MODEL_FAMILIES, *VARIANTS])


def tiny(name: str, **options: Any) -> Any:
    """A tiny model of a family, or of a variant of it, whose scores depend on positions.

    Those of untrained weights are all about 0, so that a wrong rotation would change no logit.
    """
    model = tiny_model(name.partition("-")[0], **{**VARIANTS.get(name, {}), **options})
    sharpen(model)
    return model


@families
def test_a_saved_model_loads_and_answers(family: str, tmp_path: Path) -> None:
    model = tiny(family, vocab_size=512)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert model.config.model_type == family.partition("-")[0]
    loaded = load_quantized_model(tmp_path, Fp8Scheme(kind="fp8", block_size=16), device="cpu")
    assert len(attention_layers(loaded.model)) == 2
    tokens = ids(2, 40, 1)
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
    cache = loaded.new_cache()
    first, second = (step(loaded.model, cache, part) for part in tokens.split([32, 8], 1))
    torch.testing.assert_close(first, expected[:, :32], atol=1e-4, rtol=1e-4)
    assert 0 < relative_error(second, expected[:, 32:]) < 0.05


@functools.lru_cache(maxsize=1)  # uses of a family follow each other
def exact(family: str) -> QuantizedModel:
    """A model with a cache of 16-bit numbers."""
    return quantized(tiny(family), EXACT)


@pytest.mark.thinned(7)
@pytest.mark.feature("{use}")
@families
@pytest.mark.parametrize("use", USES)
def test_a_16_bit_cache_gives_what_the_unquantized_one_gives(family: str, use: str) -> None:
    """All elements are outliers, so that packed blocks hold 16-bit numbers."""
    qm = exact(family)
    model = qm.model
    expected = USES[use](model, DynamicCache(config=model.config))
    torch.testing.assert_close(USES[use](model, qm.new_cache()), expected, **CLOSE)
    if use == "chunks and steps":  # protocol B reads each token back that it has just stored
        torch.testing.assert_close(USES[use](model, qm.new_cache("B")), expected, **CLOSE)


@pytest.mark.thinned(7)
@pytest.mark.feature("fp16 and bf16 weights")
@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_weights(family: str, dtype: torch.dtype) -> None:
    """Rotary tables may be in fp32 where weights are not."""
    model = tiny(family)
    with torch.inference_mode():
        exact = model(input_ids=ids(2, LENGTH)).logits
    model = model.to(dtype)
    error = relative_error(fed(model, DynamicCache(config=model.config)).float(), exact)
    found = fed(model, quantized(model, EXACT).new_cache())
    assert found.dtype is dtype
    assert relative_error(found.float(), exact) < 1.5 * error + 0.01


TEXT = ids(1, 128, 5)
CALIBRATION = CalibrationSpec(windows=1, window=128, sinks=1)


@functools.cache  # for three tests
def statistics_of(family: str) -> tuple[Any, list[Any]]:
    """A model and its calibration statistics."""
    model = tiny(family)
    return model, calibrate(model, [TEXT[0].tolist()], CALIBRATION)


def calibrated(family: str, scheme: NuqScheme) -> tuple[QuantizedModel, list[Any], torch.Tensor]:
    """A model with a cache from its own calibration, the statistics, and the text."""
    model, found = statistics_of(family)
    kv_heads, fractions = model.config.num_key_value_heads, CALIBRATION.outlier_fractions
    layers = [build_layer(s, scheme, fractions, kv_heads)[0] for s in found]
    return quantized(model, scheme, layers), found, TEXT


@pytest.mark.thinned(4)
@pytest.mark.feature("4 bits, own calibration")
@families
def test_four_bits_from_the_models_own_calibration_are_close(family: str) -> None:
    qm, _, text = calibrated(family, NuqScheme(kind="nuq", bits=4, block_size=32))
    with torch.inference_mode():
        expected = qm.model(input_ids=text).logits
    for protocol in ("A", "B"):
        found = feed(qm, text, None, [64, 1, 63], protocol)[0]
        assert 0 < relative_error(found, expected) < 0.08


@pytest.mark.thinned(4)
@families
def test_calibration_sees_the_keys_and_values_that_a_cache_gets(family: str) -> None:
    """The same channels in the same order, and their loss gradients."""
    qm, statistics, text = calibrated(family, EXACT)
    held = stored(feed(qm, text, None, [128])[1], 0)
    for layer, found in enumerate(statistics):
        both = held[2 * layer : 2 * layer + 2]
        keys, values = (x[:, 1:].transpose(0, 1).flatten(1) for x in both)
        for q, extreme in ((0.0, keys.amin(0)), (1.0, keys.amax(0))):
            end = percentile(found.counts, found.low, found.width, q)
            assert torch.all((end - extreme).abs() <= 1.01 * found.width + 2e-3)
        assert float(found.value_counts[0].sum()) == values.numel()
        assert torch.all(found.fisher.sum(1) > 0)
        assert torch.all(found.value_fisher[0].sum() > 0)


@pytest.mark.thinned(4)
@families
def test_calibration_sees_the_gradients_of_what_a_cache_gets(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the moments of queries and keys after RoPE."""
    qm, statistics, text = calibrated(family, EXACT)
    seen: list[tuple[torch.Tensor, ...]] = []

    def attend(cache: Any, layer: int, *given: Any) -> torch.Tensor:
        for tensor in given[1:3]:
            tensor.retain_grad()
        turned = [x if layer in cache.unrotated else rotate(x, *given[3]) for x in given[:2]]
        seen.append((*given[1:3], *(x.detach() for x in turned)))
        out: torch.Tensor = AttendingCache.attend(cache, layer, *given)
        return out

    cache = qm.new_cache()
    monkeypatch.setattr(type(cache), "attend", attend)
    embedded = qm.model.get_input_embeddings()(text).requires_grad_()
    given: dict[str, Any] = {"labels": text, "past_key_values": cache}
    (qm.model(inputs_embeds=embedded, **given).loss * text.shape[1]).backward()
    for found, (keys, values, turned_queries, turned_keys) in zip(statistics, seen, strict=True):
        assert keys.grad is not None and values.grad is not None
        slopes = (keys.grad[0, :, 1:] ** 2).sum(1).flatten()
        torch.testing.assert_close(found.fisher.sum(1), slopes, rtol=2e-3, atol=1e-6)
        every = float((values.grad[0, :, 1:] ** 2).sum())
        assert float(found.value_fisher[0].sum()) == pytest.approx(every, rel=2e-3)
        groups = turned_queries[0, :, 1:].unflatten(0, (turned_keys.shape[1], -1)).flatten(1, 2)
        for moments, rows in (
            (found.roped_key_moments, turned_keys[0, :, 1:]),
            (found.roped_query_moments, groups),
        ):
            mean = rows.mT @ rows / (rows.shape[1] / 127)  # over the query heads of a group
            torch.testing.assert_close(moments, mean, rtol=1e-3, atol=1e-2)


@families
def test_logits_behind_the_decoder_are_the_models(family: str) -> None:
    """Perplexity and likelihood compute them a few positions at a time."""
    model = tiny(family)
    qm, text = quantized(model, Fp16Scheme(kind="fp16")), ids(1, 40)
    with torch.inference_mode():
        logits = model(input_ids=text).logits.float()
    torch.testing.assert_close(qm.logits(model.model(input_ids=text).last_hidden_state), logits)
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:], reduction="none")
    measured = measure_windows(qm, text, "B", 40)
    torch.testing.assert_close(measured.nll.flatten(), losses.double(), atol=1e-4, rtol=1e-4)
    found, _ = score(qm, "B", text[0].tolist(), 9)
    assert found == pytest.approx(-float(losses[-9:].sum()), rel=1e-4)


@pytest.mark.refused(
    "scheme kind `kvquant-ref` with RoPE that changes with the length",
    "`scheme`, and why",
)
@families
def test_kvquants_own_procedure(family: str) -> None:
    model = tiny(family)
    qm = quantized(model, KvquantRefScheme(kind="kvquant-ref", bits=4))
    if family == "phi3-longrope":
        with pytest.raises(UserError, match="a rope scaling that changes with the length"):
            qm.new_cache()
        return
    with torch.inference_mode():
        expected = model(input_ids=ids(2, LENGTH)).logits
    assert relative_error(fed(model, qm.new_cache()), expected) < 0.2


@pytest.mark.parametrize("family", MODEL_FAMILIES.values(), ids=lambda family: family.name)
def test_an_attention_class_belongs_to_one_family(family: ModelFamily) -> None:
    attentions = [one.attention for one in MODEL_FAMILIES.values()]
    assert len(set(attentions)) == len(attentions)
    assert family in map(family_of_attention, attentions)


def test_kernels_read_the_past_of_a_layer_without_rope_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton's interpreter reads one block and a tail as PyTorch does."""
    options: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 1}
    model = tiny_model("smollm3", heads=2, kv_heads=1, no_rope_layers=[0], **options)
    sharpen(model)
    scheme, tokens = NuqScheme(kind="nuq", bits=4, block_size=32, outliers=0.0), ids(1, 38)
    found = []
    for kernels in ("pytorch", "triton"):
        monkeypatch.setenv("KVQUANT_KERNELS", kernels)
        cache = quantized(model, scheme).new_cache()
        found.append([step(model, cache, part) for part in tokens.split([36, 2], 1)][1])
        shape = cache._planner._stored_shape()
        assert shape is not None
        assert select("past", shape, torch.device("cpu")).backend == kernels
    torch.testing.assert_close(found[1], found[0], atol=1e-2, rtol=1e-2)
