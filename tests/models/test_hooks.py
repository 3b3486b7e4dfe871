"""A cache and the model it is used with: another model, gradients, copies, pickles.

Also covers: models.no_gradient.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvquant.errors import NonFinite, UserError
from kvquant.models.loading import install_attention
from kvquant.study.schemes import KvquantRefScheme
from tests.support.caches import EXACT, SPECS, ids, quantized, step
from tests.support.models import tiny_model

REFERENCE = KvquantRefScheme(kind="kvquant-ref", bits=4)
THETA = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.fault(
    "library",
    "a cache used with a model of another rotary embedding",
    "refused by name",
)
@pytest.mark.parametrize("spec", [EXACT, SPECS[3], REFERENCE], ids=["nuq", "kivi", "reference"])
def test_a_cache_of_a_model_with_other_angles(spec: Any) -> None:
    """It turns stored keys by its own model's rotary embedding; queries came by the other's."""
    cache = quantized(tiny_model(), spec).new_cache()
    other = tiny_model(rope_parameters=THETA)
    install_attention(other)
    with pytest.raises(UserError, match=r"cache: was made for a model with another rotary"):
        step(other, cache, ids(1, 9))
    assert cache.get_seq_length() == 0


def test_a_cache_of_a_model_with_other_layers_without_rope() -> None:
    cache = quantized(tiny_model("smollm3", no_rope_layers=[1, 0]), EXACT).new_cache()
    other = tiny_model("smollm3", no_rope_layers=[0, 1])
    install_attention(other)
    with pytest.raises(UserError, match=r"cache: was made for a model with another rotary"):
        step(other, cache, ids(1, 9))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_of_a_model_with_other_layers(layers: int) -> None:
    other = tiny_model(num_hidden_layers=layers)
    install_attention(other)
    with pytest.raises(UserError, match=f"cache: has 2 layers and the model {layers}"):
        step(other, quantized(tiny_model(), EXACT).new_cache(), ids(1, 9))


@pytest.mark.parametrize("heads", [1, 4])
def test_a_cache_of_a_model_with_other_heads_is_refused(heads: int) -> None:
    """Tables of one head would be taken for all, others fail where a block is packed."""
    other = tiny_model()
    install_attention(other)
    told = rf"another model \(quantizer: made for {heads} kv heads of 16, the model has 2 of 16\)"
    with pytest.raises(UserError, match=f"cache: was made for {told}"):
        step(other, quantized(tiny_model(kv_heads=heads), SPECS[0]).new_cache(), ids(1, 60))


def test_a_cache_of_an_equal_model() -> None:
    qm, tokens = quantized(tiny_model(), EXACT), ids(1, 9)
    other = copy.deepcopy(qm.model)
    assert torch.equal(step(other, qm.new_cache(), tokens), step(qm.model, qm.new_cache(), tokens))


@pytest.mark.fault(
    "library",
    "a backward pass over tokens that a cache holds",
    "refused by name",
)
@pytest.mark.parametrize("spec", [EXACT, REFERENCE], ids=["nuq", "reference"])
@pytest.mark.parametrize("way", ["a later call", "protocol B"])
def test_gradients_that_would_be_wrong_are_refused(spec: Any, way: str) -> None:
    """Those of keys and values were missing without a word under protocol B."""
    qm, tokens = quantized(tiny_model(), spec), ids(1, 40)
    qm.model.requires_grad_(True)
    cache = qm.new_cache("B" if way == "protocol B" else "A")
    if way == "a later call":
        qm.model(input_ids=tokens[:, :30], past_key_values=cache)
        tokens = tokens[:, 30:]
    loss = qm.model(input_ids=tokens, past_key_values=cache, labels=tokens).loss
    with pytest.raises(UserError, match=r"gradients: tokens in a quantized cache have none"):
        loss.backward()


def _checkpointing(model: Any, how: str) -> None:
    """Turns gradient checkpointing on or off, by the name of newer or older releases."""
    newer = getattr(model, f"activation_checkpointing_{how}", None)
    (newer or getattr(model, f"gradient_checkpointing_{how}"))()


@pytest.mark.fault(
    "library",
    "gradient checkpointing in training mode over a quantized cache",
    "refused by name; without the cache, or in evaluation mode, it works",
)
@pytest.mark.parametrize("spec", [EXACT, REFERENCE], ids=["nuq", "reference"])
def test_gradient_checkpointing_is_refused_by_name(spec: Any) -> None:
    """Transformers' layers drop the cache then, and an error said that one was skipped."""
    qm, tokens = quantized(tiny_model(), spec), ids(1, 40)
    want = step(qm.model, qm.new_cache(), tokens)
    _checkpointing(qm.model, "enable")
    qm.model.train()
    cache = qm.new_cache()
    with pytest.raises(UserError, match=r"^gradient_checkpointing: .*call model\.eval\(\)"):
        step(qm.model, cache, tokens)
    torch.testing.assert_close(qm.model(tokens).logits, want)
    qm.model.eval()
    assert torch.equal(step(qm.model, cache, tokens), want)
    qm.model.train()
    _checkpointing(qm.model, "disable")
    assert torch.equal(step(qm.model, qm.new_cache(), tokens), want)


def test_gradients_of_a_first_call_are_right() -> None:
    qm, tokens = quantized(tiny_model(), EXACT), ids(1, 40)
    qm.model.requires_grad_(True)
    found = []
    for cache in (DynamicCache(), qm.new_cache()):
        qm.model.zero_grad()
        qm.model(input_ids=tokens, past_key_values=cache, labels=tokens).loss.backward()
        found.append([p.grad.clone() for p in qm.model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_saved_whole_is_loaded_as_it_was() -> None:
    qm, tokens = quantized(tiny_model(), EXACT), ids(1, 9)
    file = io.BytesIO()
    torch.save(qm.model, file)
    file.seek(0)
    model = torch.load(file, weights_only=False)  # whole, as the line above saved it
    assert type(model.model.layers[0].self_attn) is type(qm.model.model.layers[0].self_attn)
    assert torch.equal(step(model, qm.new_cache(), tokens), step(qm.model, qm.new_cache(), tokens))


@pytest.mark.parametrize("spec", [EXACT, REFERENCE], ids=["nuq", "reference"])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copy_knows_the_layers_without_rope(spec: Any, way: Any) -> None:
    qm, tokens = quantized(tiny_model("smollm3", no_rope_layers=[1, 0]), spec), ids(1, 60)
    cache = qm.new_cache()
    step(qm.model, cache, tokens[:, :50])
    found = [step(qm.model, held, tokens[:, 50:]) for held in (way(cache), cache)]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.fault(
    "library",
    "`copy.copy` and `copy.deepcopy` of a filled cache",
    "both go on by themselves",
)
@pytest.mark.parametrize("spec", [EXACT, REFERENCE], ids=["nuq", "reference"])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copy_goes_its_own_way(spec: Any, way: Any) -> None:
    qm, tokens = quantized(tiny_model(), spec), ids(1, 12)
    cache = qm.new_cache()
    step(qm.model, cache, tokens[:, :9])
    other = way(cache)
    assert other.rotary is cache.rotary  # the model is not copied
    first = step(qm.model, other, tokens[:, 9:])
    assert (cache.get_seq_length(), other.get_seq_length()) == (9, 12)
    assert torch.equal(step(qm.model, cache, tokens[:, 9:]), first)
    step(qm.model, other, tokens[:, :1])
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("spec", [EXACT, REFERENCE], ids=["nuq", "reference"])
def test_a_cache_cannot_be_pickled(spec: Any) -> None:
    with pytest.raises(UserError, match="cache: cannot be pickled"):
        pickle.dumps(quantized(tiny_model(), spec).new_cache())


def test_an_empty_call_is_refused() -> None:
    qm = quantized(tiny_model(), EXACT)
    cache = qm.new_cache()
    step(qm.model, cache, ids(1, 9))
    with pytest.raises(ValueError, match="input_ids: a batch of 1 with 0 columns is empty"):
        step(qm.model, cache, ids(1, 9)[:, :0])
    with pytest.raises(ValueError, match="is empty; give generate the 9 columns of the cache and"):
        qm.model.generate(ids(1, 4, 1), past_key_values=cache, max_new_tokens=3)
    step(qm.model, cache, ids(1, 1))
    assert cache.get_seq_length() == 10


@pytest.mark.fault(
    "library",
    "keys beyond the range of fp16 over any packed cache",
    "refused by name, not NaN",
)
@pytest.mark.parametrize("spec", SPECS[2:4], ids=["nuq", "kivi"])
@pytest.mark.parametrize("protocol", ["A", "B"])
def test_what_16_bits_do_not_hold_is_refused(spec: Any, protocol: Any) -> None:
    """KIVI's cache went on with NaN; the unquantized model's scores here are all finite."""
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.k_proj.weight *= 1e7
        attention.q_proj.weight /= 1e7
    qm, tokens = quantized(model, spec), ids(1, 20)
    assert torch.isfinite(step(model, DynamicCache(), tokens)).all()
    cache = qm.new_cache(protocol)
    with pytest.raises(NonFinite, match=r"keys: NaN or Inf in the input \(fp16 overflows"):
        step(model, cache, tokens)
    with pytest.raises(UserError, match="ended early"):
        step(model, cache, tokens[:, :1])
