"""What the drop-in attention leaves as it was, and what it refuses.

Also covers: models.model_call.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from kvquant.models.loading import install_attention, uninstall_attention
from kvquant.models.model_call import arguments, cache_argument, parameters
from kvquant.models.prefill_quant import PrefillQuantizedAttention
from kvquant.study.model_families import MODEL_FAMILIES
from tests.support.caches import CLOSE, EXACT, ids, quantized, step
from tests.support.models import tiny_model


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_names_classes_and_weights_stay_the_models_own(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    attention = model.model.layers[0].self_attn
    own, output = type(attention), attention.o_proj
    install_attention(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert model.model.layers[0].self_attn is attention
    assert attention.o_proj is output
    assert isinstance(attention, own)
    assert isinstance(attention, PrefillQuantizedAttention)
    model.load_state_dict(plain.state_dict())
    tokens = ids(2, 20)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_a_saved_folder_loads_as_the_same_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    qm = quantized(tiny_model(), EXACT)
    qm.model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = ids(1, 30)
    with torch.inference_mode():
        expected = loaded(tokens).logits
    torch.testing.assert_close(step(qm.model, qm.new_cache(), tokens), expected, **CLOSE)


def test_installed_twice_is_installed_once_and_can_be_undone() -> None:
    model = tiny_model()
    own = type(model.model.layers[0].self_attn)
    hooks = len(model.model._forward_pre_hooks)
    install_attention(model)
    classes = [type(layer.self_attn) for layer in model.model.layers]
    once = len(model.model._forward_pre_hooks)
    qm = quantized(model, EXACT)  # installs again
    assert [type(layer.self_attn) for layer in model.model.layers] == classes
    assert len(model.model._forward_pre_hooks) == once
    uninstall_attention(model)
    assert [type(layer.self_attn) for layer in model.model.layers] == [own, own]
    assert len(model.model._forward_pre_hooks) == hooks
    uninstall_attention(model)
    with pytest.raises(RuntimeError, match="load_quantized_model"):
        step(model, qm.new_cache(), ids(1, 5))


def test_a_copy_of_a_model_works_by_itself() -> None:
    qm = quantized(tiny_model(), EXACT)
    other = copy.deepcopy(qm.model)
    tokens = ids(1, 40)
    expected = step(qm.model, qm.new_cache(), tokens)
    with torch.no_grad():
        for parameter in qm.model.parameters():
            parameter.zero_()
    assert torch.equal(step(other, qm.new_cache(), tokens), expected)


def test_a_replaced_projection_is_used() -> None:
    """As adapters (LoRA) do: they put a module of their own in the place of a projection."""
    qm = quantized(tiny_model(), EXACT)
    tokens = ids(1, 20)
    before = step(qm.model, qm.new_cache(), tokens)

    class Doubled(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = 2 * self.base(x)
            return out

    attention = qm.model.model.layers[1].self_attn
    attention.v_proj = Doubled(attention.v_proj)
    with torch.inference_mode():
        expected = qm.model(tokens).logits
    got = step(qm.model, qm.new_cache(), tokens)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert not torch.allclose(got, before, **CLOSE)


def test_hooks_of_accelerate_around_the_attention() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model()
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.self_attn, hooks.ModelHook())
    qm = quantized(model, EXACT)
    tokens = ids(1, 30)
    with torch.inference_mode():
        expected = model(tokens).logits
    cache = qm.new_cache()
    got = torch.cat([step(model, cache, part) for part in tokens.split([20, 1, 9], 1)], 1)
    torch.testing.assert_close(got, expected, **CLOSE)
    uninstall_attention(model)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected)


def test_a_forward_that_was_replaced_is_refused() -> None:
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    with pytest.raises(UserError, match="forward method of a LlamaAttention was replaced"):
        install_attention(model)


@pytest.mark.refused(
    "arguments that are not known (`cu_seq_lens_q`, `cache_position`)",
    "the argument; leave it out, or pass a cache of transformers",
)
@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cache_position", "something_new"])
def test_arguments_nobody_knows_are_refused_by_name(name: str) -> None:
    qm = quantized(tiny_model(), EXACT)
    given = {name: torch.arange(5)}
    for call in (qm.model, qm.model.model):
        with pytest.raises(UserError, match=rf"^{name}: ") as error, torch.inference_mode():
            call(ids(1, 5), **cache_argument(call, qm.new_cache()), **given)
        assert "\n" not in str(error.value)
    attention = qm.model.model.layers[0].self_attn
    rope = qm.model.model.rotary_emb(torch.zeros(1), torch.arange(5)[None])
    with pytest.raises(UserError, match=rf"^{name}: "):
        attention(torch.zeros(1, 5, 64), rope, None, qm.new_cache(), **given)
    with torch.inference_mode():
        qm.model(ids(1, 5), **cache_argument(qm.model, qm.new_cache()), **{name: None})


def test_a_cache_is_found_under_a_name_of_a_release_to_come() -> None:
    """An attention that gets the cache under another name does not fall back to plain attention."""
    qm = quantized(tiny_model(), EXACT)
    cache, tokens = qm.new_cache(), ids(1, 30)
    for layer in qm.model.model.layers:
        layer.self_attn.register_forward_pre_hook(_rename, with_kwargs=True)
    with torch.inference_mode():
        expected = qm.model(tokens).logits
    torch.testing.assert_close(step(qm.model, cache, tokens), expected, **CLOSE)
    assert cache.get_seq_length() == 30


def _rename(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    names = [name for name in ("cache", "past_key_values") if name in kwargs]
    return args, {("store_of_keys" if k in names else k): v for k, v in kwargs.items()}


@pytest.mark.refused(
    "`output_attentions`", "`output_attentions`; leave it out, or pass a cache of transformers"
)
def test_attention_weights_are_refused_and_given_for_other_caches() -> None:
    model = tiny_model()
    qm = quantized(model, EXACT)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model(ids(1, 9), output_attentions=True).attentions
        assert [w.shape for w in weights] == [(1, 4, 9, 9)] * 2
        with pytest.raises(UserError, match=r"^output_attentions: "):
            model(ids(1, 9), past_key_values=qm.new_cache(), output_attentions=True)
        with pytest.raises(UserError, match=r"^output_attentions: "):
            model.generate(
                ids(1, 9),
                past_key_values=qm.new_cache(),
                output_attentions=True,
                return_dict_in_generate=True,
                max_new_tokens=2,
            )
        model.config.output_attentions = True
        with pytest.raises(UserError, match=r"^output_attentions: "):
            model(ids(1, 9), past_key_values=qm.new_cache())


def test_hidden_states_are_given() -> None:
    qm = quantized(tiny_model(), EXACT)
    with torch.inference_mode():
        plain = qm.model(ids(1, 9), output_hidden_states=True).hidden_states
        cache = qm.new_cache()
        ours = qm.model(ids(1, 9), past_key_values=cache, output_hidden_states=True).hidden_states
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(b, a, **CLOSE)


def test_training_with_attention_dropout_is_refused() -> None:
    qm = quantized(tiny_model(attention_dropout=0.1), EXACT)
    step(qm.model, qm.new_cache(), ids(1, 9))  # not applied in evaluation
    qm.model.train()
    with pytest.raises(UserError, match=r"^attention_dropout: "):
        qm.model(ids(1, 9), past_key_values=qm.new_cache())
    plain = quantized(tiny_model(), EXACT)
    plain.model.train()
    plain.model(ids(1, 9), past_key_values=plain.new_cache())


def test_everything_may_be_given_by_position() -> None:
    qm = quantized(tiny_model(), EXACT)
    tokens = ids(2, 50)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    where = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        for call in (qm.model, qm.model.model):
            expected = call(tokens, mask, where)[0][:, -1]
            cache = qm.new_cache()
            call(tokens[:, :40], mask[:, :40], where[:, :40], cache)
            got = call(tokens[:, 40:], mask, where[:, 40:], cache)[0][:, -1]
            assert cache.lengths == [50, 43]
            torch.testing.assert_close(got, expected, **CLOSE)


def test_arguments_by_name() -> None:
    class Module(torch.nn.Module):
        def forward(self, a: int, b: int = 0, *, c: int = 0, **kwargs: Any) -> None: ...

    names = parameters(Module.forward)
    assert names == ("a", "b")
    assert arguments(names, (1, 2), {"c": 3, "d": 4}) == {"a": 1, "b": 2, "c": 3, "d": 4}
